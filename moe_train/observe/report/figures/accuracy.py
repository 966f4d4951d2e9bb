"""How often a classifier is right about held-out texts, over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import BLUE, GREEN, INK, draw_line, legend_above, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Held-out accuracy"
CAPTION = (
    "Accuracy is the share of the held-out texts whose class was told. F1 of a class is the harmonic mean of precision "
    "(of the texts told to be of it, the share that are) and recall (of its texts, the share that were told); macro-F1 "
    "is its mean over the classes, each counting alike. The dashed line is what always telling the largest class "
    "reaches. Evaluations during training look at a part of the held-out texts, the last one at all."
)
ABSENT = "No eval record holds an accuracy yet."


def draw(run: RunRecord) -> Figure | None:
    """Return accuracy and macro-F1 over steps, with the share of the largest class."""
    accuracy, f1 = run.eval_series("accuracy"), run.eval_series("macro_f1")
    if not accuracy:
        return None
    figure = new_figure(3.0)
    axes = figure.subplots()
    draw_line(axes, accuracy, color=BLUE, label="accuracy", marker="o", markersize=4)
    if f1:
        draw_line(axes, f1, color=GREEN, label="macro-F1", marker="o", markersize=3, linestyle=":")
    majority = run.eval_series("majority")
    if majority:
        level = float(majority.values[-1])
        axes.axhline(level, color=INK, linewidth=1, linestyle="--", label=f"largest class {level:.3f}")
    axes.set(xlabel="optimizer step", ylabel="share of held-out texts")
    legend_above(axes)
    return figure
