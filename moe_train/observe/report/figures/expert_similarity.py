"""Whether the experts stay different from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import draw_bound, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Similarity of the experts"
CAPTION = (
    "Above, the mean cosine between what two experts of a layer add to a token: 0 is unrelated, 1 is collapse to one; "
    "below, as how many experts that are unrelated to each other they count."
)
ABSENT = "No layer has two experts to compare, or there is no train record yet."


def draw(run: RunRecord) -> Figure | None:
    """Return mean pairwise cosine and effective rank per layer, or None where no layer has a pair of experts."""
    sizes = {layer: num_experts(run, layer) for layer in run.graph_layers}
    # Without a matrix of cosines the number is unknown, and the lines may be there all the same.
    cosine, rank = (paired(layer_series(run, name), sizes) for name in ("similarity", "effective_rank"))
    if not cosine and not rank:
        return None
    figure = new_figure(4.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    draw_per_layer(above, cosine, legend=bool(cosine))
    above.set_ylabel("mean cosine")
    draw_per_layer(below, rank, legend=not cosine)
    known = {sizes[layer] for layer in rank}
    if len(known) == 1 and (size := known.pop()) is not None:
        draw_bound(below, size, f"{size} experts")
    if rank:
        below.set_ylim(bottom=1)
    below.set(xlabel="optimizer step", ylabel="effective rank")
    return figure


def num_experts(run: RunRecord, layer: str) -> int | None:
    """Return how many experts a layer has, or None when no record tells."""
    cosines = run.first_and_last(layer, "cosines")
    return None if cosines is None else cosines[1].values.shape[1]


def paired(lines: dict[str, Series], sizes: dict[str, int | None]) -> dict[str, Series]:
    """Return the lines of the layers that are not known to have a single expert."""
    return {layer: line for layer, line in lines.items() if sizes.get(layer) != 1}
