"""How unevenly the experts of the attention are loaded, and how undecided their routers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import INK, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.figures.balance import imbalance
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Imbalance and entropy in attention"
CAPTION = (
    "Above, the most loaded of a layer's experts for values, or for outputs, relative to the mean (1 is even); below, "
    "the mean entropy of a token's distribution over experts."
)
ABSENT = "No record tells the load of experts in attention yet."


def draw(run: RunRecord) -> Figure | None:
    """Return largest over mean load and entropy per layer and side, or None when neither is known."""
    loads = {layer: line for layer in run.attention_layers if (line := imbalance(run, layer))}
    entropies = layer_series(run, "entropy", run.attention_layers)
    if not loads and not entropies:
        return None
    figure = new_figure(4.0)
    above, below = figure.subplots(2, 1, sharex=True)
    draw_per_layer(above, loads, legend=bool(loads))
    above.axhline(1.0, color=INK, linewidth=1, linestyle="--")
    above.set_ylabel("max / mean load")
    draw_per_layer(below, entropies, legend=not loads)
    below.set_ylim(bottom=0)
    below.set(xlabel="optimizer step", ylabel="entropy (nats)")
    return figure
