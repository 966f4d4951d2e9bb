"""Shows how even the experts' load became in groups of runs: a table per layer and step, and a picture.

Usage: python scripts/balance_over_time.py PICTURE.png 'LABEL=RUN_DIR,RUN_DIR,...' ...

Each group is one setting, its runs are seeds. Max violation is the fullest expert over the mean, minus one (arXiv
2408.15664, eq. 4); a figure is the mean over the records of the last tenth of the steps up to the one named.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the steps after which figures are shown."""


@dataclass(frozen=True)
class Run:
    """What one run recorded.

    Attributes:
        violations: by layer, the step and max violation of each record.
        heldout: last held-out loss, in nats per token.
        steps: optimizer steps.
    """

    violations: Mapping[str, list[tuple[int, float]]]
    heldout: float
    steps: int

    @staticmethod
    def read(folder: Path) -> Run:
        """Read a run folder."""
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        train = [record for record in records if record["kind"] == "train"]
        evals = [record for record in records if record["kind"] == "eval"]
        layers = sorted(key.split("/")[1] for key in train[0] if key.endswith("/max_violation"))
        return Run(
            {layer: [(r["step"], r[f"moe/{layer}/max_violation"]) for r in train] for layer in layers},
            evals[-1]["loss"],
            train[-1]["step"],
        )

    def violation(self, layer: str, share: float) -> float:
        """Return the mean over the tenth of the steps that ends after ``share`` of them."""
        end, window = share * self.steps, 0.1 * self.steps
        return statistics.fmean(value for step, value in self.violations[layer] if end - window < step <= end)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(groups: Mapping[str, list[Run]]) -> str:
    """Return the figures as a Markdown table."""
    first = next(iter(groups.values()))[0]
    steps = [round(share * first.steps) for share in SHARES]
    lines = [f"| | layer | {' | '.join(f'step {step}' for step in steps)} |", f"|---|---|{'---:|' * len(steps)}"]
    for label, runs in groups.items():
        for layer in first.violations:
            cells = [spread([run.violation(layer, share) for run in runs]) for share in SHARES]
            lines.append(f"| {label} | {int(layer.removeprefix('layer_'))} | {' | '.join(cells)} |")
    losses = [f"{label}: held-out loss {spread([run.heldout for run in runs], 3)}" for label, runs in groups.items()]
    return "\n".join([*lines, "", *losses])


def draw(groups: Mapping[str, list[Run]], path: Path) -> None:
    """Write the picture: a panel per layer, a line per run, a colour per group."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from moe_train.observe.report.drawing import PALETTE, STYLE

    style: dict[Any, Any] = STYLE | {"figure.facecolor": "white"}
    layers = list(next(iter(groups.values()))[0].violations)
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, len(layers), figsize=(8.0, 2.6), sharey=True, layout="constrained")
        for layer, panel in zip(layers, axes, strict=True):
            for (label, runs), color in zip(groups.items(), PALETTE, strict=False):
                for number, run in enumerate(runs):
                    steps, values = zip(*run.violations[layer], strict=True)
                    panel.plot(steps, values, color=color, linewidth=1.0, label=None if number else label)
            panel.set(title=f"layer {int(layer.removeprefix('layer_'))}", xlabel="optimizer step")
        axes[0].set(ylabel="max violation", ylim=(0, 1.05 * max(panel.dataLim.ymax for panel in axes)))
        axes[-1].legend()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Print the table and write the picture."""
    picture, *named = arguments
    groups = {
        label: [Run.read(Path(folder)) for folder in folders.split(",")]
        for label, _, folders in (group.partition("=") for group in named)
    }
    print(table(groups))
    draw(groups, Path(picture))


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in group for group in sys.argv[2:]):
        sys.exit(__doc__)
    main(sys.argv[1:])
