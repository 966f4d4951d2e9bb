"""Which expert gets how much, over the run: one heat map per MoE layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.records import layer_title
from moe_train.observe.report.drawing import new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Load of the experts"
CAPTION = (
    "Each row is an expert and its colour its share of the layer's assignments relative to an even share of 1/E: "
    "white is even, orange is overloaded, purple is starved."
)
ABSENT = "The run has no MoE layers, or no train record yet."

MOST_COLUMNS = 3
MOST_BINS = 200  # columns of pixels per panel that steps are averaged into
MOST_CELLS = 600_000  # over all panels: what keeps the page of a large model under 2 MB
LIMIT = 2.0  # colours end at a quarter and at four times the even share (powers of two)
SHADES = 17  # as many as the eye tells apart; an image of few colours is small


def draw(run: RunRecord) -> Figure | None:
    """Return one panel per MoE layer, experts over steps, coloured by log2 of load times E."""
    return draw_layers(run, run.layers)


def draw_layers(run: RunRecord, layers: Iterable[str]) -> Figure | None:
    """Return the panels of ``layers``, which have equally many experts, or None when no record has their load."""
    loads = {layer: run.loads(layer) for layer in layers}
    loads = {layer: found for layer, found in loads.items() if len(found[0])}
    if not loads:
        return None
    columns = min(len(loads), MOST_COLUMNS) if len(loads) != 4 else 2
    rows = -(-len(loads) // columns)
    figure = new_figure(0.9 + 1.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, (layer, (steps, load)) in zip(panels, loads.items(), strict=False):
        image = draw_panel(axes, steps, binned(load, min(MOST_BINS, MOST_CELLS // (len(loads) * load.shape[1]))))
        axes.set_title(layer_title(layer))
    for axes in list(panels)[len(loads) :]:
        axes.set_axis_off()
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel("expert", fontsize="medium")
    bar = figure.colorbar(image, ax=list(figure.axes), extend="both", shrink=min(1.0, 3 / (1 + rows)), aspect=25)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "even", "2x", "4x"])
    bar.outline.set_visible(False)
    return figure


def draw_panel(axes: Axes, steps: NDArray[np.int64], load: NDArray[np.float64]) -> Any:
    """Draw the heat map of one layer and return the image.

    Args:
        axes: where to draw.
        steps: steps of the records, shape (N,); only the first and the last are needed.
        load: fractions of the assignments of shape (bins, E), evenly spread over the steps.
    """
    from matplotlib import colormaps

    relative = load * load.shape[1]
    # An expert without a token has no logarithm: it gets the colour of the most starved.
    shade = np.log2(np.maximum(relative, 2.0**-LIMIT / 2))
    extent = (float(steps[0]), float(max(steps[-1], steps[0] + 1)), load.shape[1] - 0.5, -0.5)
    axes.grid(visible=False)
    axes.locator_params(axis="y", integer=True, nbins=5)
    axes.locator_params(axis="x", integer=True, nbins=4)
    colours = colormaps["PuOr_r"].resampled(SHADES)
    # "none" stores one pixel per cell and leaves the enlarging to the browser: small, and sharp at any zoom.
    return axes.imshow(
        shade.T, cmap=colours, vmin=-LIMIT, vmax=LIMIT, extent=extent, aspect="auto", interpolation="none"
    )


def binned(load: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """Return ``load`` (N, E) averaged over time into at most ``bins`` rows."""
    if len(load) <= bins:
        return load
    return np.stack([part.mean(axis=0) for part in np.array_split(load, max(bins, 1))])
