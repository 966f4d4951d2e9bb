"""The figures of the report, one per file: each has ``TITLE``, ``CAPTION``, ``ABSENT`` and ``draw``.

To add one, write its file and name it in the list of the runs that it speaks of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moe_train.observe.report.figures import (
    adjacency_entropy,
    balance,
    bias_range,
    dropped,
    entropy,
    expert_load,
    expert_similarity,
    graph_weights,
    loss,
    message_norm,
    overflow,
    rank_load,
    step_time,
    throughput,
)
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureModule(Protocol):
    """What a file of this folder defines."""

    TITLE: str
    """Heading."""
    CAPTION: str
    """One sentence that says how to read the figure."""
    ABSENT: str
    """One sentence for the page when there is nothing to draw."""

    def draw(self, run: RunRecord) -> Figure | None:
        """Return the figure, or None when the run has nothing for it."""


OF_ALL: tuple[FigureModule, ...] = (loss, throughput, step_time)
"""Figures of every run, in the order of the page."""
OF_ROUTED: tuple[FigureModule, ...] = (expert_load, balance, bias_range, dropped, overflow, entropy)
"""Figures of runs whose layers have routers."""
OF_SPREAD: tuple[FigureModule, ...] = (rank_load,)
"""Figures of runs whose layers have routers, and experts on several ranks."""
OF_COUPLED: tuple[FigureModule, ...] = (expert_similarity, graph_weights, message_norm, adjacency_entropy)
"""Figures of runs whose experts are coupled by a graph."""


def figures_of(run: RunRecord) -> tuple[FigureModule, ...]:
    """Return the figures that speak of this run's kind of layers; one whose kind is not known counts as routed."""
    # Before its first record a run is known by its configuration alone.
    coupled = bool(run.graph_layers) or run.setting("model.ffn.graph") is not None
    routed = bool(run.routed_layers) or not coupled
    spread = routed and rank_load.is_spread(run)
    return OF_ALL + OF_ROUTED * routed + OF_SPREAD * spread + OF_COUPLED * coupled
