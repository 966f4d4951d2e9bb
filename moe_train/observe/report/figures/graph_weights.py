"""Which expert listens to which: the edges at the start and at the end, and what was sent along them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.records import layer_title
from moe_train.observe.report.drawing import WIDTH_INCHES, ends_and_middle, new_figure
from moe_train.observe.report.record import Matrices, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TITLE = "Who listens to whom"
CAPTION = (
    "Each row is an expert that receives, each column one that sends. Left and middle: the weights of the edges at the "
    "first and at the last record, on one scale; right: the strength of the messages, weight times how well the two "
    "experts match, mean over the tokens of the last record. Grey: no edge."
)
ABSENT = "The experts exchange no messages, or there is no train record yet."

MOST_GRAPHS = 12  # six rows of two
MOST_DEPTH = 3
LEAST_CELL_INCHES = 0.19  # a narrower cell has no room for a number
NO_EDGE = (0.5, 0.5, 0.5, 0.18)  # seen on white paper and on a dark page

# Inches: the places are computed here, for matplotlib's own layout of so many squares moves with every drawing of it.
LEFT, RIGHT, GAP = 0.5, 0.15, 0.15
TITLES, TICKS = 0.45, 0.5
LARGEST_PANEL = 2.0
NOTE, SCALES = 0.3, 0.65


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: above it.
        values_EE: [E, E] from the expert of the column to that of the row; NaN where there is no edge.
    """

    title: str
    values_EE: NDArray[np.float64]


@dataclass(frozen=True)
class Graph:
    """One graph layer of one layer with experts.

    Attributes:
        title: which one.
        edges: their weights at the first and at the last record.
        messages: their strength at the last record; None where it is not known.
    """

    title: str
    edges: tuple[Panel, Panel]
    messages: Panel | None


@dataclass(frozen=True)
class Scale:
    """What the colours of some heat maps stand for.

    Attributes:
        low: value of the first colour.
        high: value of the last.
        colours: from the first to the last.
    """

    low: float
    high: float
    colours: Colormap

    @classmethod
    def over(cls, panels: Iterable[Panel | None], colours: str) -> Scale:
        """Return the scale of ``panels``, in ``colours``: from 0 up, or to both sides of 0 with negative values."""
        from matplotlib import colormaps

        values = np.concatenate([[0.0], *(panel.values_EE.ravel() for panel in panels if panel is not None)])
        largest = float(np.nanmax(np.abs(values))) or 1.0
        signed = bool((values < 0).any())
        # Yellow in the middle: white would pass for the grey of no edge.
        return cls(-largest if signed else 0.0, largest, colormaps["RdYlBu_r" if signed else colours])


@dataclass(frozen=True)
class Grid:
    """Places of the heat maps, in inches from the upper left corner of the figure.

    Attributes:
        columns: graphs in a row.
        rows: of graphs.
        top: height above the first row.
    """

    columns: int
    rows: int
    top: float

    @property
    def panel(self) -> float:
        """Side of a heat map."""
        return min(LARGEST_PANEL, (WIDTH_INCHES / self.columns - LEFT - RIGHT - 2 * GAP) / 3)

    @property
    def row(self) -> float:
        """Height of a row."""
        return TITLES + self.panel + TICKS

    @property
    def height(self) -> float:
        """Height of the figure."""
        return self.top + self.rows * self.row + SCALES

    def corner(self, index: int) -> tuple[float, float]:
        """Return x and y of the upper left corner of the first heat map of a graph."""
        row, column = divmod(index, self.columns)
        return column * WIDTH_INCHES / self.columns + LEFT, self.top + row * self.row + TITLES

    def axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        """Return new axes with the upper left corner at x and y."""
        return figure.add_axes(
            (x / WIDTH_INCHES, 1 - (y + height) / self.height, width / WIDTH_INCHES, height / self.height)
        )

    def text(self, figure: Figure, x: float, y: float, text: str) -> None:
        """Write ``text`` with its lower left corner at x and y."""
        figure.text(x / WIDTH_INCHES, 1 - y / self.height, text)


def draw(run: RunRecord) -> Figure | None:
    """Return three heat maps per graph layer, or None when no expert can listen to another."""
    graphs, note = chosen_graphs(run)
    if not any(np.isfinite(graph.edges[1].values_EE).any() for graph in graphs):
        return None
    columns = min(2, len(graphs))
    grid = Grid(columns, rows=-(-len(graphs) // columns), top=NOTE if note else 0.0)
    figure = new_figure(grid.height, layout=None)
    grid.text(figure, LEFT, 0.2, note)
    edges = Scale.over((panel for graph in graphs for panel in graph.edges), "viridis")
    messages = Scale.over((graph.messages for graph in graphs), "plasma")
    for index, graph in enumerate(graphs):
        draw_graph(figure, grid, index, graph, edges, messages)
    width, y = WIDTH_INCHES / 2 - LEFT - RIGHT, grid.height - SCALES + 0.1
    left = grid.axes(figure, LEFT, y, width, 0.1)
    draw_scale(figure, left, edges, "weight of the edge")
    right = grid.axes(figure, WIDTH_INCHES / 2 + LEFT, y, width, 0.1)
    draw_scale(figure, right, messages, "strength of the message")
    return figure


def chosen_graphs(run: RunRecord) -> tuple[list[Graph], str]:
    """Return the graph layers that the page has room for, and which of how many they are, if not all."""
    found = {layer: ends for layer in run.graph_layers if (ends := run.first_and_last(layer, "adjacency"))}
    depth = max((len(last.values) for _, last in found.values()), default=0)
    depths = ends_and_middle(range(depth), MOST_DEPTH)
    layers = ends_and_middle(list(found), MOST_GRAPHS // max(1, len(depths)))
    notes = [f"first, middle and last of {len(found)} layers"] if len(layers) < len(found) else []
    if len(depths) < depth:
        notes.append(f"first, middle and last of {depth} graph layers")
    sent = {layer: run.first_and_last(layer, "message_strength") for layer in layers}
    graphs = [
        graph_at(layer, at, found[layer], None if (ends := sent[layer]) is None else ends[1])
        for layer in layers
        for at in depths
        if at < len(found[layer][1].values)
    ]
    return graphs, "; ".join(notes)


def graph_at(layer: str, at: int, edges: tuple[Matrices, Matrices], sent: Matrices | None) -> Graph:
    """Return what is drawn of graph layer ``at`` of a layer, from its edges and messages over all graph layers."""
    first, last = edges
    depth = len(last.values)

    def panel(title: str, matrices: Matrices, weights: Matrices) -> Panel:
        # A weight of exactly zero is none: no sigmoid, and no share of a softmax, gets there.
        return Panel(title, np.where(weights.values[at] == 0, np.nan, matrices.values[at]))

    title = layer_title(layer)
    return Graph(
        title=title if depth == 1 else f"{title}, graph layer {at + 1} of {depth}",
        edges=(panel(f"step {first.step}", first, first), panel(f"step {last.step}", last, last)),
        messages=panel("messages", sent, last) if sent and sent.values.shape == last.values.shape else None,
    )


def draw_graph(figure: Figure, grid: Grid, index: int, graph: Graph, edges: Scale, messages: Scale) -> None:
    """Draw the three heat maps of a graph layer side by side."""
    x, y = grid.corner(index)
    grid.text(figure, x, y - 0.25, graph.title)
    drawn = (graph.edges[0], edges), (graph.edges[1], edges), (graph.messages, messages)
    for at, (panel, scale) in enumerate(drawn):
        if panel is None:
            continue
        axes = grid.axes(figure, x + at * (grid.panel + GAP), y, grid.panel, grid.panel)
        draw_panel(axes, panel, scale, numbers=grid.panel / len(panel.values_EE) >= LEAST_CELL_INCHES)
        if at == 0:
            axes.set_ylabel("receives", fontsize="small")
        else:
            axes.tick_params(labelleft=False)


def draw_panel(axes: Axes, panel: Panel, scale: Scale, numbers: bool) -> None:
    """Draw one heat map, with its ``numbers`` in the cells where they have room."""
    size = len(panel.values_EE)
    colours = scale.colours.with_extremes(bad=NO_EDGE)
    axes.imshow(panel.values_EE, cmap=colours, vmin=scale.low, vmax=scale.high, interpolation="none")
    axes.set_title(panel.title, fontsize="small")
    axes.set_xlabel("sends", fontsize="small")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    ticks = range(0, size, max(1, size // 4))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(length=0, pad=2, labelsize="x-small")
    if numbers:
        write_numbers(axes, panel, scale)


def write_numbers(axes: Axes, panel: Panel, scale: Scale) -> None:
    """Write the value of every edge in its cell, in black or white, whichever its colour leaves legible."""
    for (row, column), value in np.ndenumerate(panel.values_EE):
        if np.isfinite(value):
            red, green, blue, _ = scale.colours((value - scale.low) / (scale.high - scale.low))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma of ITU-R BT.601
            ink = "black" if light else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=6.5)


def draw_scale(figure: Figure, axes: Axes, scale: Scale, label: str) -> None:
    """Draw a scale of colours along ``axes``."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colours = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal", ticks=MaxNLocator(5))
    bar.outline.set_visible(False)
    axes.tick_params(labelsize="small")
    axes.set_xlabel(label, fontsize="small")
