"""Measures what it costs to shard experts over processes: one process of two threads against two of one, EP=2.

Usage: python scripts/layout_speed.py [--rounds 5] [--steps 30] [--folder DIR] [KEY=VALUE ...]

Both train the same model on the same global batches, started by launch/local.sh, one after the other in each round;
keys go to both. The ratio is the median over the rounds of the ratio within a round of the median tokens/s of the later
records.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LAUNCHER = Path(__file__).resolve().parent.parent / "launch/local.sh"
WARM_UP = 10
"""Steps of a run that do not count."""


@dataclass(frozen=True)
class Way:
    """One way to use the same cores.

    Attributes:
        name: in the table.
        ranks: processes.
        threads: of each.
        keys: of the configuration.
    """

    name: str
    ranks: int
    threads: int
    keys: tuple[str, ...]


WAYS = (
    Way("1 process, 2 threads", 1, 2, ("parallel.ep=1",)),
    Way("2 processes, 1 thread each, EP=2", 2, 1, ("parallel.ep=2",)),
)


def tokens_per_s(way: Way, keys: list[str], steps: int, folder: Path) -> float:
    """Train anew and return the median of the records after the warm-up."""
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"run.dir={folder}", f"train.steps={steps}", "log.every=1", "checkpoint.every=0", "eval.every=0"]
    own += ["log.wandb.mode=disabled", "data.heldout_fraction=0", *way.keys]
    words = ["bash", str(LAUNCHER), str(way.ranks), *own, *keys]
    variables = os.environ | {"OMP_NUM_THREADS": str(way.threads)}
    subprocess.run(words, env=variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train" and record["step"] > WARM_UP]
    return float(np.median([record["tokens_per_s"] for record in records]))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What it costs to shard experts over processes.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one")
    parser.add_argument("keys", nargs="*", help="KEY=VALUE for both")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        rounds = [
            [tokens_per_s(way, given.keys, given.steps, folder / f"way_{number}") for number, way in enumerate(WAYS)]
            for _ in range(given.rounds)
        ]
    speeds_RW = np.array(rounds)
    ratios_RW = speeds_RW / speeds_RW[:, :1]
    print("| layout | tokens/s, median (range) | relative, median (range) |\n|---|---|---|")
    for number, way in enumerate(WAYS):
        speeds, ratios = speeds_RW[:, number], ratios_RW[:, number]
        print(
            f"| {way.name} | {np.median(speeds):.0f} ({speeds.min():.0f} to {speeds.max():.0f}) "
            f"| {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}) |"
        )


if __name__ == "__main__":
    main()
