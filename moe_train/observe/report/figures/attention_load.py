"""Which expert of the attention gets how much, over the run: one heat map per layer and side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.figures import expert_load
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Load of the experts in attention"
CAPTION = (
    "Experts that make values, and those that make outputs: each row is an expert, head by head, and its colour its "
    "share of the assignments relative to an even share: white is even, orange is overloaded, purple is starved."
)
ABSENT = "No record tells the load of experts in attention yet."


def draw(run: RunRecord) -> Figure | None:
    """Return one panel per layer and side, experts of all heads over steps, coloured by log2 of load times E."""
    return expert_load.draw_layers(run, run.attention_layers)
