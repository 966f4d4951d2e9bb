"""How undecided the routers are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import draw_bound, draw_per_layer, layer_series, new_figure
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
        draw_bound(axes, math.log(num_experts), f"ln {num_experts}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step", ylabel="entropy (nats)")
    return figure
