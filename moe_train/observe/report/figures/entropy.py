"""How undecided the routers are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import INK, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Entropy of the routers"
CAPTION = (
    "Mean entropy of a token's distribution over experts: near ln E the router has no preference, near 0 no doubt."
)
ABSENT = "No train record holds a router entropy."


def draw(run: RunRecord) -> Figure | None:
    """Return the mean entropy per token and layer, in nats, under its upper bound ln E."""
    lines = layer_series(run, "entropy")
    if not lines:
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    draw_per_layer(axes, lines)
    experts = {run.loads(layer)[1].shape[-1] for layer in lines}
    if len(experts) == 1:
        num_experts = experts.pop()
        axes.axhline(math.log(num_experts), color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            f"ln {num_experts}",
            xy=(1, math.log(num_experts)),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -3),
            textcoords="offset points",
            ha="right",
            va="top",
        )
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step", ylabel="entropy (nats)")
    return figure
