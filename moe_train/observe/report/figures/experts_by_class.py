"""Which expert takes which class: the specialisation of a classifier's experts as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.classes import BY_CLASS
from moe_train.observe.records import finite, layer_title
from moe_train.observe.report.counts import class_names, draw_counts, matrix_of
from moe_train.observe.report.drawing import new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Experts by class"
CAPTION = (
    "Each column is an expert and shows how what comes to it divides over the classes: the colour is the share of the "
    "column, the number the tokens of held-out texts (in a head: the texts) whose first choice it is; a column without "
    "colour is an expert that nothing comes to. SI, the specialisation index, is 1 minus the entropy of a column over "
    "the logarithm of the number of classes, averaged over the experts by how much comes to them: 1 where every expert "
    "has one class, 0 where all have the same mixture. LBV, the load-balance variance, is the variance of the "
    "experts' mean weights: 0 is even."
)
ABSENT = "No eval record tells which expert took which class yet."


def draw(run: RunRecord) -> Figure | None:
    """Return one panel per layer with a router, classes by experts, of the last evaluation."""
    found = {layer: matrix_of(run, f"moe/{layer}/{BY_CLASS}") for layer in run.layers}
    known = {layer: counts for layer, counts in found.items() if counts is not None}
    if not known:
        return None
    tallest = max(len(counts) for counts in known.values())
    figure = new_figure((0.9 + 0.32 * tallest) * len(known) + 0.3)
    panels = figure.subplots(len(known), 1, squeeze=False).flat
    for axes, (layer, counts) in zip(panels, known.items(), strict=True):
        image = draw_counts(axes, counts, axis=0)
        names = class_names(run, len(counts))
        axes.set_yticks(range(len(names)), labels=names)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(f"{layer_title(layer)}: {indices(run, layer)}")
    figure.supxlabel("expert", fontsize="medium")
    bar = figure.colorbar(image, ax=list(figure.axes), label="share of the expert", format="{x:.0%}", aspect=25)
    bar.outline.set_visible(False)
    return figure


def indices(run: RunRecord, layer: str) -> str:
    """Return specialisation index and load-balance variance of the last evaluation in words."""
    last = next(record for record in reversed(run.evals) if f"moe/{layer}/{BY_CLASS}" in record)
    index, variance = (finite(last.get(f"moe/{layer}/{name}")) for name in ("specialisation", "load_balance_variance"))
    told = "SI undefined" if index is None else f"SI {index:.3f}"
    return told + ("" if variance is None else f", LBV {variance:.4g}")
