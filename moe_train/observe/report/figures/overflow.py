"""What became of the assignments that their expert did not take, by cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.report.drawing import PALETTE, draw_line, layer_series, legend_above, new_figure
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Overflow by cause"
CAPTION = "Share of all assignments, mean over the layers: dropped for one of three causes, or moved to another expert."
ABSENT = "No assignment was dropped or rerouted."

CAUSES = {
    "dropped_capacity_fraction": "dropped: expert full",
    "dropped_device_fraction": "dropped: device full",
    "dropped_router_fraction": "dropped: by the router",
    "rerouted_fraction": "rerouted",
}
"""Names of the records' keys, with their labels."""


def draw(run: RunRecord) -> Figure | None:
    """Return one line per cause that ever occurred, or None when none did."""
    from matplotlib.ticker import PercentFormatter

    lines = {label: mean_over_layers(run, name) for name, label in CAUSES.items()}
    shown = {label: line for label, line in lines.items() if line is not None and (line.values > 0).any()}
    if not shown:
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    for label, line in shown.items():
        draw_line(axes, line, color=PALETTE[list(lines).index(label)], label=label)
    legend_above(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set(xlabel="optimizer step", ylabel="share of assignments")
    return figure


def mean_over_layers(run: RunRecord, name: str) -> Series | None:
    """Return the mean of ``moe/<layer>/<name>`` over the layers at every step, or None when no record has it."""
    lines = list(layer_series(run, name).values())
    return Series(lines[0].steps, np.mean([line.values for line in lines], axis=0)) if lines else None
