"""Matrices of counts as tiles: what the figures of classifiers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.records import finite
from moe_train.observe.report.drawing import INK
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 400  # with numbers in them; beyond, nobody could read them
DARK = 0.55  # share from which the tile needs a light number


def matrix_of(run: RunRecord, key: str) -> NDArray[np.float64] | None:
    """Return a matrix of counts from the last eval record that holds a whole one, or None."""
    for record in reversed(run.evals):
        rows = record.get(key)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            continue
        known = [[finite(count) for count in row] for row in rows]
        if len({len(row) for row in known}) == 1 and not any(count is None for row in known for count in row):
            return np.array(known, dtype=np.float64)
    return None


def class_names(run: RunRecord, number: int) -> list[str]:
    """Return the names of the classes; their numbers where the records have none."""
    told: list[object] = next(
        (record["classes"] for record in reversed(run.evals) if isinstance(record.get("classes"), list)), []
    )
    return [str(name) for name in told] if len(told) == number else [str(place) for place in range(number)]


def draw_counts(axes: Axes, counts: NDArray[np.float64], axis: int) -> Any:
    """Draw counts (rows, columns) as tiles, coloured by their share along ``axis``, and return the image.

    A row or column of zeros has no shares and stays empty.
    """
    totals = counts.sum(axis=axis, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="none")
    if counts.size <= MOST_CELLS:
        for (row, column), share in np.ndenumerate(shares):
            # Tiles keep their colours in both themes of the page, and so do the numbers on them; an empty one is page.
            colour = INK if np.isnan(share) else "white" if share > DARK else "#222222"
            number = f"{int(counts[row, column]):,}"
            axes.text(column, row, number, ha="center", va="center", fontsize="small", color=colour)
    return image
