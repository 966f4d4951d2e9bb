"""To how many others an expert listens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.report.drawing import draw_bound, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Entropy of the edges"
CAPTION = (
    "Entropy of the shares that an expert's sources have in its edges, mean over experts and graph layers: near the "
    "dashed line it listens to all alike, near 0 to one."
)
ABSENT = "The experts exchange no messages, or there is no train record yet."


def draw(run: RunRecord) -> Figure | None:
    """Return the entropy of the edges per layer, in nats, under its upper bound, the logarithm of the sources."""
    lines = layer_series(run, "adjacency_entropy")
    sources = {layer: num_sources(run, layer) for layer in lines}
    lines = {layer: line for layer, line in lines.items() if sources[layer] != 0}
    if not lines:
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    draw_per_layer(axes, lines)
    known = {sources[layer] for layer in lines}
    if len(known) == 1 and (number := known.pop()) is not None:
        draw_bound(axes, math.log(number), f"ln {number}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step", ylabel="entropy (nats)")
    return figure


def num_sources(run: RunRecord, layer: str) -> int | None:
    """Return to how many experts one listens at most, or None when no record tells."""
    weights = run.first_and_last(layer, "adjacency")
    return None if weights is None else int(np.count_nonzero(np.nan_to_num(weights[1].values), axis=2).max())
