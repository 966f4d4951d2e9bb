"""How much each rank had to do, from the recorded loads of experts and where these were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.records import layer_title
from moe_train.observe.report.drawing import INK, draw_per_layer, ends_and_middle, new_figure
from moe_train.observe.report.figures.expert_load import MOST_BINS, binned, draw_panel
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Load of the ranks"
CAPTION = (
    "Above, each layer's fullest rank relative to the mean (1 is even), for which the others wait: left as the experts "
    "were placed, with a dotted line wherever some moved, right as it would have been had none ever moved; below, the "
    "ranks of a few layers, coloured as the experts are."
)
ABSENT = "The run has no layer that routes, or no train record yet."

MOST_PANELS = 3


@dataclass(frozen=True)
class Since:
    """Where experts are from a step on.

    Attributes:
        step: the records after it are of these places.
        ranks: of an EP group.
        experts: by layer the expert at each place; a layer that is missing has each at the place of its index.
    """

    step: int
    ranks: int
    experts: Mapping[str, Sequence[int]]

    def order(self, layer: str, num_experts: int) -> list[int]:
        """Return the expert at each place of a layer with so many."""
        return list(self.experts.get(layer, range(num_experts)))


def draw(run: RunRecord) -> Figure | None:
    """Return lines of the fullest rank, and heat maps of the first, the middle and the last layer."""
    history = places_over_time(run)
    loads = {layer: run.loads(layer) for layer in (*run.layers, *run.attention_layers)}
    loads = {layer: found for layer, found in loads.items() if len(found[0])}
    placed = {layer: rank_shares(layer, *found, history) for layer, found in loads.items()}
    fixed = {layer: rank_shares(layer, *found, unmoved(history)) for layer, found in loads.items()}
    if not placed or max(shares.shape[1] for shares in placed.values()) < 2:
        return None
    sizes = {layer: found[1].shape[1] for layer, found in loads.items()}
    figure = new_figure(4.6)
    shown = ends_and_middle(list(placed), MOST_PANELS)
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[5, 4])
    left, right = above.subplots(1, 2, sharex=True, sharey=True)
    for axes, shares, label in ((left, placed, "fullest / mean rank"), (right, fixed, "had none moved")):
        draw_fullest(axes, {layer: (loads[layer][0], own) for layer, own in shares.items()}, legend=axes is left)
        axes.set(xlabel="optimizer step", ylabel=label)
    for before, since in pairwise(history):
        if any(before.order(layer, size) != since.order(layer, size) for layer, size in sizes.items()):
            left.axvline(since.step, color=INK, linewidth=0.8, linestyle=":")
    for axes, layer in zip(below.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        draw_panel(axes, loads[layer][0], binned(placed[layer], MOST_BINS))
        axes.set(title=layer_title(layer), xlabel="optimizer step", ylabel="rank")
    return figure


def draw_fullest(axes: Axes, shares: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]], legend: bool) -> None:
    """Draw the fullest rank relative to the mean, one line per layer."""
    lines = {layer: Series(steps, own.max(axis=1) * own.shape[1]) for layer, (steps, own) in shares.items()}
    draw_per_layer(axes, {layer: line for layer, line in lines.items() if line}, legend)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle="--")


def is_spread(run: RunRecord) -> bool:
    """Whether the experts of a layer are ever on more than one rank."""
    return any(since.ranks > 1 for since in places_over_time(run))


def places_over_time(run: RunRecord) -> list[Since]:
    """Return where experts were, in order of steps, beginning with the places of their indices.

    Every life of a run begins so, unless its events say otherwise at once; what an earlier one did after the step from
    which it goes on did not happen.
    """
    ranks = run.setting("parallel.ep")
    beginning = Since(-1, ranks if isinstance(ranks, int) and ranks > 0 else 1, {})
    history: list[Since] = []
    for event in run.events:
        kind, step = event.get("event"), event["step"]
        if kind in ("started", "resumed", "placement"):
            found = of_event(event) if kind == "placement" else replace(beginning, step=step)
            history = [since for since in history if since.step < step] + ([found] if found else [])
    return [beginning, *history]


def of_event(event: Mapping[str, Any]) -> Since | None:
    """Return what an event says, or None when it is torn."""
    ranks, experts = event.get("ep"), event.get("experts")
    if not isinstance(ranks, int) or ranks < 1 or not isinstance(experts, dict):
        return None
    whole = {layer: order for layer, order in experts.items() if is_order(order) and len(order) % ranks == 0}
    return Since(event["step"], ranks, whole)


def is_order(order: object) -> bool:
    """Whether this is a list of all numbers from 0 on, in some order."""
    whole = isinstance(order, list) and all(isinstance(expert, int) for expert in order)
    return isinstance(order, list) and whole and sorted(order) == list(range(len(order)))


def unmoved(history: Sequence[Since]) -> list[Since]:
    """Return the same as if no expert had ever moved."""
    return [Since(since.step, since.ranks, {}) for since in history]


def rank_shares(
    layer: str, steps: NDArray[np.int64], load: NDArray[np.float64], history: Sequence[Since]
) -> NDArray[np.float64]:
    """Return each rank's share of a layer's assignments, of the places in force at each record.

    Args:
        layer: its name.
        steps: of the records, shape (N,).
        load: each expert's share, shape (N, E).
        history: places in order of steps, the first in force from the start.

    Returns:
        Shape (N, P) for the number of ranks P at the last record; earlier records of another number are NaN. Of shape
        (N, 1) where that number does not divide the experts.
    """
    at = [max(place for place, since in enumerate(history) if since.step < step) for step in steps]
    ranks = history[at[-1]].ranks if load.shape[1] % history[at[-1]].ranks == 0 else 1
    shares = np.full((len(steps), ranks), np.nan)
    for row, since in enumerate(history[place] for place in at):
        order = since.order(layer, load.shape[1])
        if since.ranks == ranks and len(order) == load.shape[1]:
            shares[row] = load[row, order].reshape(ranks, -1).sum(axis=1)
    return shares
