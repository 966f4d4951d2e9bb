"""Which classes a classifier takes for which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.counts import class_names, draw_counts, matrix_of
from moe_train.observe.report.drawing import new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Confusion of classes"
CAPTION = (
    "Rows are the true classes of the held-out texts, columns what was told, in the last evaluation; the colour is the "
    "share of the row, the number the texts. What is right lies on the diagonal."
)
ABSENT = "No eval record holds a confusion matrix yet."


def draw(run: RunRecord) -> Figure | None:
    """Return the matrix of the last evaluation."""
    counts = matrix_of(run, "confusion")
    if counts is None:
        return None
    names = class_names(run, len(counts))
    figure = new_figure(1.4 + 0.5 * len(counts))
    axes = figure.subplots()
    image = draw_counts(axes, counts, axis=1)
    axes.set_xticks(range(len(names)), labels=names)
    axes.set_yticks(range(len(names)), labels=names)
    axes.set(xlabel="told", ylabel="true")
    figure.colorbar(image, ax=axes, label="share of the row", format="{x:.0%}", aspect=15).outline.set_visible(False)
    return figure
