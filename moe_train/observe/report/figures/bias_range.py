"""How far apart the biases of loss-free balancing have moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Range of the selection bias"
CAPTION = (
    "Largest minus smallest bias of each layer's experts: it levels off once the load is even, "
    "and keeps growing where the bias cannot even it out."
)
ABSENT = "The run has no bias on the choice of experts (model/ffn/balance=loss_free)."


def draw(run: RunRecord) -> Figure | None:
    """Return the range of the bias per layer, in the unit of the router's scores."""
    lines = layer_series(run, "bias_range")
    if not lines:
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    draw_per_layer(axes, lines)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step", ylabel="max - min bias")
    return figure
