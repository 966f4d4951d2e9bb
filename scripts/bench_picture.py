"""Draws what a layer costs per token against experts, tokens, length and EP size.

Usage: python scripts/bench_picture.py [bench/scaling.json] [docs/cost_curves.png]

Reads what ``python -m moe_train.bench bench=scaling`` writes. A point is the median over the rounds of the quotient
within a round, its bar reaches from the smallest to the largest; the filled point is what the others are relative to.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PANELS = {
    "experts": ("experts E, at equal active FLOPs", "flat: more experts cost nothing"),
    "tokens": ("tokens per call", "flat: linear in tokens, ±15 %"),
    "length": ("positions per sequence, whole block", "flat: longer texts cost nothing"),
    "ep": ("EP size, a process of one thread each", "1 / EP: as many cores as processes"),
}
"""Axis and ideal of each curve, in order."""
BAND = 0.15
"""How far from linear cost per token may be."""


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        x: what grows, there.
        costs: per token, relative to the curve's reference, by round.
        is_reference: whether it is that.
    """

    x: float
    costs: tuple[float, ...]
    is_reference: bool

    @property
    def median(self) -> float:
        """The middle round's."""
        return statistics.median(self.costs)


def curves_of(record: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Return the points of each curve that was measured; places that failed are left out."""
    curves: dict[str, list[Point]] = {}
    for name in PANELS:
        rows = [row for row in record["rows"] if row["labels"]["curve"] == name and row["ms"] is not None]
        if not rows:
            continue
        reference = next(row for row in rows if row["facts"]["reference"])
        curves[name] = sorted((point_of(row, reference) for row in rows), key=lambda point: point.x)
    return curves


def point_of(row: Mapping[str, Any], reference: Mapping[str, Any]) -> Point:
    """Return the point of a row."""
    ratio = reference["facts"]["tokens"] / row["facts"]["tokens"]
    costs = tuple(ratio * ms / base_ms for ms, base_ms in zip(row["ms"], reference["ms"], strict=True))
    return Point(row["facts"]["x"], costs, row is reference)


def draw(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write the picture, a panel per curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from moe_train.observe.report.drawing import PALETTE, STYLE

    style: dict[Any, Any] = STYLE | {"figure.facecolor": "white"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(8.0, 5.6), layout="constrained")
        for name, panel, color in zip(PANELS, axes.flat, PALETTE, strict=False):
            if name in curves:
                draw_curve(panel, name, curves[name], color)
            else:
                panel.set_axis_off()
        figure.supylabel("cost per token, relative", fontsize="medium")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def draw_curve(panel: Any, name: str, points: Sequence[Point], color: str) -> None:
    """Draw one panel."""
    label, ideal = PANELS[name]
    x = [point.x for point in points]
    below = [point.median - min(point.costs) for point in points]
    above = [max(point.costs) - point.median for point in points]
    panel.plot(x, [1.0 / v if name == "ep" else 1.0 for v in x], "--", color="grey", linewidth=1.0, label=ideal)
    if name == "tokens":
        panel.axhspan(1.0 - BAND, 1.0 + BAND, color="grey", alpha=0.15, linewidth=0.0)
    panel.errorbar(x, [point.median for point in points], [below, above], color=color, linewidth=1.2, capsize=2.5)
    for point in points:
        panel.plot(point.x, point.median, "o", color=color, markersize=5, fillstyle=fill_of(point))
    panel.set_xscale("log", base=2)
    panel.set_xticks(x, [f"{v:,.0f}" for v in x])
    panel.minorticks_off()
    panel.set(xlabel=label, ylim=(0.0, 1.15 * max(1.0 + BAND, *(max(point.costs) for point in points))))
    panel.legend(loc="lower left")


def fill_of(point: Point) -> str:
    """Return how matplotlib fills its marker."""
    return "full" if point.is_reference else "none"


def main(arguments: Sequence[str]) -> None:
    """Read, and write the picture."""
    source, picture = [*arguments, *("bench/scaling.json", "docs/cost_curves.png")[len(arguments) :]]
    draw(curves_of(json.loads(Path(source).read_text(encoding="utf-8"))), Path(picture))


if __name__ == "__main__":
    if len(sys.argv) > 3 or any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(__doc__)
    main(sys.argv[1:])
