"""The figures of the report, one per file: each has ``TITLE``, ``CAPTION``, ``ABSENT`` and ``draw``.

To add one, write its file and name it in the list of the runs that it speaks of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moe_train.observe.report.figures import (
    accuracy,
    adjacency_entropy,
    attention_balance,
    attention_load,
    balance,
    bias_range,
    confusion,
    depth,
    dropped,
    entropy,
    expert_load,
    expert_similarity,
    experts_by_class,
    graph_weights,
    loss,
    message_norm,
    overflow,
    rank_load,
    step_time,
    throughput,
    utilisation,
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


OF_ATTENTION: tuple[FigureModule, ...] = (attention_load, attention_balance)
"""Figures of runs whose attention has experts."""
OF_CLASSES: tuple[FigureModule, ...] = (accuracy, confusion)
"""Figures of runs whose models tell classes."""
OF_CLASS_EXPERTS: tuple[FigureModule, ...] = (experts_by_class, utilisation)
"""Figures of those of them whose layers have routers."""
OF_DEPTH: tuple[FigureModule, ...] = (depth,)
"""Figures of runs with blocks that only some tokens pass."""


def figures_of(run: RunRecord) -> tuple[FigureModule, ...]:
    """Return the figures that speak of this run's kinds of layers; one of which none is known counts as routed."""
    # Before its first record a run is known by its configuration alone.
    coupled = bool(run.graph_layers) or run.setting("model.ffn.graph") is not None
    attention = bool(run.attention_layers) or run.setting("model.attention.kind") == "switchhead"
    deep = bool(run.depth_layers) or run.setting("model.depth.kind") == "mixture_of_depths"
    dense = (attention or deep) and run.setting("model.ffn.num_experts") == 0
    routed = bool(run.routed_layers) or not (coupled or dense)
    spread = (routed or attention) and rank_load.is_spread(run)
    of_classes = (OF_CLASSES + OF_CLASS_EXPERTS * routed) * run.has_classes
    of_routers = OF_ROUTED * routed + OF_ATTENTION * attention + OF_SPREAD * spread
    return OF_ALL[:1] + of_classes + OF_ALL[1:] + of_routers + OF_COUPLED * coupled + OF_DEPTH * deep
