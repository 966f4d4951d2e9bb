"""Makes a table over runs: mean, spread and count of the final held-out figures, grouped by what is not the seed.

Usage: python scripts/compare_runs.py RUN_FOLDER [RUN_FOLDER ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

FIGURES = ("loss", "bits_per_byte")


def final_figures(folder: Path) -> dict[str, float]:
    """Return the last held-out record of a run and its parameter counts."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    started = next(r for r in records if r.get("active_parameters"))
    last = [r for r in records if r["kind"] == "eval"][-1]
    return {**last, "total": started["parameters"], "active": started["active_parameters"]}


def group_of(folder: Path) -> str:
    """Return the name of a run without its seed."""
    return "-".join(part for part in folder.name.split("-") if not part.startswith("seed_"))


def main(folders: list[Path]) -> None:
    """Print a Markdown table."""
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder in folders:
        groups[group_of(folder)].append(final_figures(folder))
    print("| runs | seeds | step | parameters | active | held-out loss | bits per byte |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in sorted(groups.items()):
        cells = []
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f} ({min(values):.4f} to {max(values):.4f})")
        first = runs[0]
        sizes = f"{first['total']:,} | {first['active']:,}"
        print(f"| {name} | {len(runs)} | {first['step']} | {sizes} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
