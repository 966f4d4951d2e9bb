"""The share of assignments that were dropped, whatever the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Dropped assignments"
CAPTION = "Share of each layer's token-to-expert assignments that were dropped: their tokens skipped their expert."
ABSENT = "No assignment was dropped."


def draw(run: RunRecord) -> Figure | None:
    """Return the dropped fraction per layer, or None when nothing was ever dropped."""
    from matplotlib.ticker import PercentFormatter

    lines = layer_series(run, "dropped_fraction")
    if not any((line.values > 0).any() for line in lines.values()):
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    draw_per_layer(axes, lines)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set(xlabel="optimizer step", ylabel="dropped")
    return figure
