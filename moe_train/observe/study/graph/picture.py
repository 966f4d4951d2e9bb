"""The graph study as a picture: loss over experts and over graph layers, and what changes of one thing do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import INK, PALETTE, new_figure
from moe_train.observe.study.graph.outcome import BASE, BY_EXPERTS, BY_LAYERS, KINDS, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIT = "held-out loss, nats per token"
LINES_INCHES, FRAME_INCHES, ROW_INCHES = 3.2, 0.9, 0.22
ASIDE = 0.06
"""Distance between kinds at one place of the horizontal axis, in steps of it: error bars must be told apart."""


def draw(comparison: Comparison) -> Figure:
    """Return two panels of lines, one per kind, and below them a line of dots per variant, where there are others."""
    references = [f"{kind}_{BASE}" for kind in KINDS if comparison.of(f"{kind}_{BASE}")]
    rows = [*comparison.others, *references] if comparison.others else []
    below = FRAME_INCHES + ROW_INCHES * len(rows) if rows else 0.0
    figure = new_figure(LINES_INCHES + below)
    grid = figure.add_gridspec(2 if rows else 1, 2, height_ratios=[LINES_INCHES, below] if rows else None)
    by_experts = figure.add_subplot(grid[0, 0])
    by_layers = figure.add_subplot(grid[0, 1], sharey=by_experts)
    draw_kinds(by_experts, comparison, BY_EXPERTS)
    draw_kinds(by_layers, comparison, BY_LAYERS)
    by_experts.set(title="2 graph layers", xlabel="experts", ylabel=UNIT)
    by_layers.set(title="4 experts", xlabel="graph layers")
    handles, labels = by_experts.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(KINDS))
    if rows:
        draw_rows(figure.add_subplot(grid[1, :]), comparison, rows)
    return figure


def draw_kinds(axes: Axes, comparison: Comparison, sizes: Mapping[int, str]) -> None:
    """Draw the mean loss of each kind over its sizes, the standard deviation as a bar and a dot per run."""
    for number, kind in enumerate(KINDS):
        shift = (number - (len(KINDS) - 1) / 2) * ASIDE
        known = {
            place + shift: comparison.losses(f"{kind}_{size}")
            for place, size in enumerate(sizes.values())
            if comparison.of(f"{kind}_{size}")
        }
        means, bars = [loss.mean for loss in known.values()], [loss.deviation or 0.0 for loss in known.values()]
        colour = PALETTE[number]
        axes.errorbar(list(known), means, yerr=bars, label=kind, color=colour, capsize=2.5, marker="o", markersize=4)
        for place, loss in known.items():
            axes.plot([place] * len(loss.values), loss.values, ".", color=colour, alpha=0.4, markersize=4)
    axes.set_xticks(range(len(sizes)), labels=[str(size) for size in sizes])


def draw_rows(axes: Axes, comparison: Comparison, rows: list[str]) -> None:
    """Draw a dot per run, the mean as a bar and the standard deviation as a line; a dashed line marks the base."""
    for place, name in enumerate(rows):
        loss = comparison.losses(name)
        kind = name.partition("_")[0]
        colour = PALETTE[KINDS.index(kind)] if kind in KINDS else INK
        axes.plot(loss.values, [place] * len(loss.values), "o", color=colour, markersize=3.5, alpha=0.45)
        axes.errorbar(loss.mean, place, xerr=loss.deviation, fmt="|", color=colour, markersize=9, linewidth=1.4)
    if comparison.of(f"graph_{BASE}"):
        axes.axvline(comparison.losses(f"graph_{BASE}").mean, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title=f"Variants of graph_{BASE}", xlabel=UNIT)
