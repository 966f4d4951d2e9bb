"""What all figures share: look, helpers for lines over steps, and embedding in the page.

Figures are made without pyplot, whose global state would outlive the report in a long-running process.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.metrics import Ema
from moe_train.observe.records import layer_title
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Item = TypeVar("Item")

# Okabe and Ito's palette, told apart by colour-blind readers (without yellow and black, which one theme would hide).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, VERMILLION, GREEN = PALETTE[:3]
# Text and axes: a black that no other mark uses, so that embed() can hand it to the page's theme.
INK = "#010203"

WIDTH_INCHES = 8.0
MOST_POINTS = 800  # per line: more than the page has pixels for
SMOOTHING_WINDOWS = 50  # per run
PNG_DPI = 150

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # Text stays text: small, selectable, and in the reader's font.
    "svg.fonttype": "none",
    # Equal figures get equal ids: a report made twice is the same page.
    "svg.hashsalt": "moe_train",
}


def new_figure(height_inches: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure as wide as the page; without a layout its axes stay where they are put."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout=layout)


def draw_line(axes: Axes, line: Series, **style: Any) -> None:
    """Draw the finite points of ``line`` over its steps, thinned to what can be seen; a single one as a dot."""
    known = np.isfinite(line.values)
    if known.sum() == 1:
        style["marker"] = "o"
    axes.plot(thinned(line.steps[known]), thinned(line.values[known]), **style)


def draw_per_layer(axes: Axes, lines: dict[str, Series], legend: bool = True) -> None:
    """Draw one line per layer: named colours for a few, a scale from shallow to deep for many."""
    from matplotlib import colormaps

    few = len(lines) <= len(PALETTE)
    for depth, (layer, line) in enumerate(lines.items()):
        # The ends of the scale are left out: one is lost on white paper, the other on a dark page.
        colour = PALETTE[depth] if few else colormaps["viridis"](0.3 + 0.5 * depth / (len(lines) - 1))
        named = few or depth in (0, len(lines) - 1)
        label = layer_title(layer) if named else None
        draw_line(axes, line, color=colour, label=label, linewidth=1.4 if few else 0.9)
    if legend:
        legend_above(axes)


def draw_bound(axes: Axes, level: float, label: str) -> None:
    """Draw a dashed line at a ``level`` that the others cannot pass, with a label at its right end."""
    axes.axhline(level, color=INK, linewidth=1, linestyle="--")
    axes.annotate(
        label,
        xy=(1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -3),
        textcoords="offset points",
        ha="right",
        va="top",
    )


def legend_above(axes: Axes) -> None:
    """Set the legend on one line above ``axes``, where it hides nothing."""
    axes.legend(ncols=len(PALETTE), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def ends_and_middle(items: Sequence[Item], most: int) -> list[Item]:
    """Return all ``items`` when they are at most ``most``, else the first, the middle and the last."""
    return list(items) if len(items) <= most else [items[0], items[len(items) // 2], items[-1]]


def layer_series(run: RunRecord, name: str, layers: Iterable[str] | None = None) -> dict[str, Series]:
    """Return ``moe/<layer>/<name>`` of those ``layers`` (default: the feed-forward ones) that have a finite value."""
    found = {layer: run.train_series(f"moe/{layer}/{name}") for layer in (run.layers if layers is None else layers)}
    return {layer: line for layer, line in found.items() if line}


def thinned(values: NDArray[Any]) -> NDArray[Any]:
    """Return at most MOST_POINTS of ``values`` (N, ...), evenly spread over the first axis, both ends included."""
    if len(values) <= MOST_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(np.int64)]


def smoothed(line: Series) -> Series:
    """Return the exponential moving average of the finite points of ``line``, over a fiftieth of the run.

    A window of a fixed number of records would lag far behind in a short run and smooth nothing in a long one.
    """
    known = np.isfinite(line.values)
    window = max(1.0, known.sum() / SMOOTHING_WINDOWS)
    average = Ema(decay=1 - 1 / window)
    return Series(line.steps[known], np.array([average.update(float(value)) for value in line.values[known]]))


def embed(figure: Figure, title: str) -> str:
    """Return ``figure`` as HTML that needs nothing else: inline SVG in the page's colours, or a PNG where smaller.

    Args:
        figure: what to show.
        title: what it shows, as HTML, for readers who cannot see it.
    """
    vector, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None}, dpi=PNG_DPI)
    figure.savefig(pixels, format="png", dpi=PNG_DPI, facecolor="white")
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    encoded = base64.b64encode(pixels.getvalue()).decode("ascii")
    if len(svg) <= len(encoded):
        return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f'<img alt="{title}" src="data:image/png;base64,{encoded}">'
