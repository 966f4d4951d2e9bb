"""A study as a picture: one line per variant, one panel per figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import INK, PALETTE, new_figure
from moe_train.observe.study.outcome import FIGURES, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "topk"
"""The variant that a dashed line marks in every panel."""
UNITS = {"loss": "nats per token", "max_violation": "max / mean - 1", "dropped_fraction": "", "entropy": "nats"}
FRAME_INCHES, LINE_INCHES = 1.0, 0.24


def draw(variants: Sequence[Variant]) -> Figure:
    """Return a dot per run, the mean as a bar and the standard deviation as a line, variants from top to bottom."""
    figure = new_figure(FRAME_INCHES + LINE_INCHES * len(variants))
    panels = figure.subplots(1, len(FIGURES), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, FIGURES.items(), strict=True):
        draw_panel(axes, variants, name)
        axes.set(title=title, xlabel=UNITS[name])
    panels[0].set_yticks(range(len(variants)), labels=[label(variant) for variant in variants])
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    return figure


def draw_panel(axes: Axes, variants: Sequence[Variant], name: str) -> None:
    """Draw one figure of all variants; the colour tells the family."""
    from matplotlib.ticker import PercentFormatter

    for place, variant in enumerate(variants):
        spread = variant.spread(name)
        if spread is None:
            continue
        colour = PALETTE[variant.family]
        axes.plot(spread.values, [place] * len(spread.values), "o", color=colour, markersize=3.5, alpha=0.45)
        axes.errorbar(spread.mean, place, xerr=spread.deviation, fmt="|", color=colour, markersize=9, linewidth=1.4)
        if variant.name == BASELINE:
            axes.axvline(spread.mean, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.locator_params(axis="x", nbins=4)
    if name == "dropped_fraction":
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))


def label(variant: Variant) -> str:
    """Return the name of a variant, with a star where the loss cannot be compared."""
    return variant.name.replace("_", " ") + (" *" if variant.runs[0].sees_future else "")
