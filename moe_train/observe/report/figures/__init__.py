"""The figures of the report, one per file: each has ``TITLE``, ``CAPTION``, ``ABSENT`` and ``draw``.

To add one, write its file and name it in ``FIGURES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moe_train.observe.report.figures import (
    balance,
    bias_range,
    dropped,
    entropy,
    expert_load,
    loss,
    overflow,
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


FIGURES: tuple[FigureModule, ...] = (
    loss,
    throughput,
    step_time,
    expert_load,
    balance,
    bias_range,
    dropped,
    overflow,
    entropy,
)
"""All figures, in the order of the page."""
