"""How unevenly the experts are loaded, and how many get nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.records import load_imbalance
from moe_train.observe.report.drawing import INK, VERMILLION, draw_line, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord, Series, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Imbalance and dead experts"
CAPTION = "Above, each layer's most loaded expert relative to the mean (1 is even); below, experts without any token."
ABSENT = "The run has no MoE layers, or no train record yet."


def draw(run: RunRecord) -> Figure | None:
    """Return largest over mean load per layer, and the number of dead experts over all layers."""
    lines = {layer: line for layer in run.layers if (line := imbalance(run, layer))}
    if not lines:
        return None
    figure = new_figure(4.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_per_layer(above, lines)
    above.axhline(1.0, color=INK, linewidth=1, linestyle="--")
    above.set_ylabel("max / mean load")
    dead = layer_series(run, "dead_experts")
    if dead:
        total = series(run.train, lambda record: sum(record.get(f"moe/{layer}/dead_experts") or 0 for layer in dead))
        draw_line(below, total, color=VERMILLION, drawstyle="steps-post")
    below.set_ylim(bottom=0)
    below.locator_params(axis="y", integer=True, nbins=4)
    below.set(xlabel="optimizer step", ylabel="dead experts")
    return figure


def imbalance(run: RunRecord, layer: str) -> Series:
    """Return one layer's largest over mean expert load at every step."""
    return series(run.train, lambda record: load_imbalance(record.get(f"moe/{layer}/load")))
