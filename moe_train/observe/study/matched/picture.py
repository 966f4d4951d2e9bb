"""A matched study as a picture: a row per variant, its losses on the left, its speed on the right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import INK, PALETTE, new_figure
from moe_train.observe.study.matched.outcome import Comparison, MatchedOutcome
from moe_train.observe.study.outcome import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAME_INCHES, ROW_INCHES = 1.3, 0.3
ASIDE = 0.22
"""How far below its row a loss that knows later tokens stands, in rows."""


def draw(comparison: Comparison) -> Figure:
    """Return a dot per run, the mean as a bar and the standard deviation as a line; a colour per group."""
    variants = comparison.variants
    figure = new_figure(FRAME_INCHES + ROW_INCHES * len(variants))
    losses, speeds = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for place, variant in enumerate(variants):
        colour = colour_of(comparison, variant)
        draw_runs(losses, comparison.spread(variant, lambda run: run.loss), place, colour)
        ahead = comparison.spread(variant, lambda run: run.loss_looking_ahead)
        draw_runs(losses, ahead, place + ASIDE, colour, filled=False)
        draw_runs(speeds, comparison.spread(variant, lambda run: run.tokens_per_s), place, colour)
    for group in comparison.plan.groups:
        mark_reference(losses, comparison, group.variants, lambda run: run.loss)
        mark_reference(speeds, comparison, group.variants, lambda run: run.tokens_per_s)
    losses.set_yticks(range(len(variants)), labels=variants)
    losses.set_ylim(len(variants) - 0.5, -0.5)
    speeds.set_xlim(left=0)
    losses.set(title=title_of(comparison), xlabel="held-out loss, nats per token")
    speeds.set(title="Speed", xlabel="tokens per second in training")
    return figure


def title_of(comparison: Comparison) -> str:
    """Return what the dots of the left panel are."""
    ahead = any(run.loss_looking_ahead is not None for run in comparison.runs)
    return "Loss (hollow: choices know later tokens)" if ahead else "Loss"


def colour_of(comparison: Comparison, variant: str) -> str:
    """Return the colour of a variant's group."""
    group = comparison.plan.group_of(variant)
    return INK if group is None else PALETTE[comparison.plan.groups.index(group)]


def draw_runs(axes: Axes, spread: Spread | None, place: float, colour: str, filled: bool = True) -> None:
    """Draw the runs of one variant in the row at ``place``; nothing where there are none."""
    if spread is None:
        return
    face = colour if filled else "none"
    axes.plot(spread.values, [place] * len(spread.values), "o", color=colour, mfc=face, markersize=3.5, alpha=0.45)
    axes.errorbar(spread.mean, place, xerr=spread.deviation, fmt="|", color=colour, markersize=9, linewidth=1.4)


def mark_reference(
    axes: Axes, comparison: Comparison, variants: list[str], figure: Callable[[MatchedOutcome], float | None]
) -> None:
    """Draw a dashed line at the reference's mean along the rows of its group."""
    rows = [place for place, variant in enumerate(comparison.variants) if variant in variants]
    reference = comparison.spread(variants[0], figure)
    if reference is not None:
        axes.vlines(reference.mean, rows[0] - 0.4, rows[-1] + 0.4, color=INK, linewidth=0.8, linestyle="--", alpha=0.6)
