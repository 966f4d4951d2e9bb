"""How much an expert receives, compared with what it sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import draw_per_layer, ends_and_middle, new_figure
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Weight of the messages"
CAPTION = (
    "Norm of the messages that an expert receives relative to that of what an expert sends, mean over experts and "
    "tokens: near 0 the experts work on their own."
)
ABSENT = "The experts exchange no messages, or there is no train record yet."

MOST_PANELS = 3


def draw(run: RunRecord) -> Figure | None:
    """Return the relative norm per layer, one panel per graph layer, or None when nothing is ever received."""
    norms = {layer: relative_norms(run, layer) for layer in run.graph_layers}
    depth = max((len(lines) for lines in norms.values()), default=0)
    panels = [{layer: lines[at] for layer, lines in norms.items() if at < len(lines)} for at in range(depth)]
    heard = [(at, lines) for at, lines in enumerate(panels) if any((line.values > 0).any() for line in lines.values())]
    if not heard:
        return None
    shown = ends_and_middle(heard, MOST_PANELS)
    figure = new_figure(1.0 + 1.6 * len(shown))
    column = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (at, lines) in zip(column, shown, strict=True):
        draw_per_layer(axes, {layer: line for layer, line in lines.items() if line}, legend=axes is column[0])
        axes.set_ylabel("received / held" if depth == 1 else f"received / held\ngraph layer {at + 1} of {depth}")
    column[0].set_ylim(bottom=0)  # of all: now that every line has widened the common axis
    column[-1].set_xlabel("optimizer step")
    return figure


def relative_norms(run: RunRecord, layer: str) -> list[Series]:
    """Return the relative norm of the messages over the run, one series per graph layer."""
    steps, norms = run.rows(layer, "message_norm")
    return [Series(steps, column) for column in norms.T] if len(steps) else []
