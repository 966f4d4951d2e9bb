"""A study of scaling as a picture: six small panels, one question each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.report.drawing import BLUE, INK, PALETTE, VERMILLION, new_figure
from moe_train.observe.study.scaling.capacity import CapacitySweep, uniform_drop_rate
from moe_train.observe.study.scaling.fit import interval
from moe_train.observe.study.scaling.frontier import Curve, Frontier
from moe_train.observe.study.scaling.law import Array, Law, Places
from moe_train.observe.study.scaling.points import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_train.observe.study.scaling.result import ScalingStudy

HEIGHT_INCHES = 8.6
PROMISE = 0.03
"""Relative error of the prediction that a study promises to stay within."""
NEAR = 1.25
"""Factor within which a run counts as one of a budget."""
FACTORS_DRAWN = 60
Shape = tuple[float, float]


def draw(study: ScalingStudy) -> Figure:
    """Return the picture: prediction, isoFLOP curves, experts, granularity, drops, and loss against capacity."""
    figure = new_figure(HEIGHT_INCHES)
    (parity, curves), (experts, granularity), (drops, limits) = figure.subplots(3, 2)
    draw_parity(parity, study)
    draw_curves(curves, study.frontier, study.points)
    if "mu" in study.fit.free:
        draw_experts(experts, study.frontier)
        draw_granularity(granularity, study.frontier)
    else:
        experts.remove()
        granularity.remove()
    if study.capacity is None:
        for axes in (drops, limits):
            axes.remove()
    else:
        draw_drops(drops, study.capacity)
        draw_limits(limits, study.capacity)
    return figure


def draw_parity(axes: Axes, study: ScalingStudy) -> None:
    """Draw each run's loss over what the law says of it: fitted ones as dots, held-out ones as stars."""
    fit = study.fit
    shapes = sorted({point.expansion for point in fit.points})
    for place, expansion in enumerate(shapes):
        points = [point for point in fit.points if point.expansion == expansion]
        label = "dense" if expansion == 1 else f"E={expansion:g}"
        colour = PALETTE[place % len(PALETTE)]
        said = fit.law.loss(Places.of(points))
        axes.plot(said, [p.loss for p in points], "o", color=colour, markersize=3.5, alpha=0.7, label=label)
    for point, told in study.heldout:
        error = [[told.loss - told.low], [told.high - told.loss]]
        axes.errorbar(told.loss, point.loss, xerr=error, fmt="*", color=INK, markersize=11, linewidth=1)
        write(axes, "held out", told.loss, point.loss, (8, -11))
    ends = np.array([min(p.loss for p in study.points) * 0.98, max(p.loss for p in fit.points) * 1.01])
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    axes.fill_between(ends, ends * (1 - PROMISE), ends * (1 + PROMISE), color=INK, alpha=0.08, linewidth=0)
    axes.legend(loc="upper left", handletextpad=0.1, labelspacing=0.2)
    axes.set(title=f"Measured and predicted (band: ±{PROMISE:.0%})", xlabel="predicted loss, nats per token")
    axes.set_ylabel("measured loss")


def draw_curves(axes: Axes, frontier: Frontier, points: Sequence[Point]) -> None:
    """Draw loss over size at fixed FLOPs for the usual shape, with the runs near each budget and the optimum."""
    shape = frontier.usual_shape
    losses = [point.loss for point in frontier.fit.points]
    for budget, colour in budgets(frontier):
        curve = frontier.curve(budget, shape)
        losses.append(float(curve.losses.min()))
        draw_measured(axes, curve.parameters, curve.losses, curve.is_measured, colour)
        draw_optimum(axes, curve, colour)
        near = [p for p in points if is_of(p, shape) and 1 / NEAR <= p.training_flops / budget <= NEAR]
        axes.plot([p.active_parameters for p in near], [p.loss for p in near], "o", color=colour, markersize=4)
    axes.set_ylim(min(losses) * 0.95, max(losses) * 1.03)
    axes.set_xscale("log")
    name = "dense" if shape[0] == 1 else f"E={shape[0]:g}, G={shape[1]:g}"
    axes.set(title=f"Same FLOPs, {name} (dashed: not measured)", xlabel="active parameters N", ylabel="loss")


def draw_optimum(axes: Axes, curve: Curve, colour: Any) -> None:
    """Mark the least loss of a curve and name its budget there."""
    best = curve.best
    place = float(curve.parameters[best]), float(curve.losses[best])
    axes.plot(*place, "D", color=colour, markersize=6, markerfacecolor="white")
    write(axes, flops_text(curve.budget), *place, (-4, -13), colour, ha="left")


def draw_measured(axes: Axes, across: Array, losses: Array, is_measured: NDArray[np.bool_], colour: Any) -> None:
    """Draw a curve dashed, and solid where its places were measured."""
    axes.plot(across, losses, color=colour, linewidth=1, linestyle=(0, (2, 2)))
    axes.plot(across, np.where(is_measured, losses, np.nan), color=colour, linewidth=1.8)


def draw_experts(axes: Axes, frontier: Frontier) -> None:
    """Draw what experts gain over a dense model of equal N and D, by their number."""
    _, granularity = frontier.usual_shape
    values = sorted({expansion for expansion, _ in frontier.shapes})
    draw_gains(axes, frontier, values, lambda value: (value, granularity) if value > 1 else (1.0, 1.0))
    across = "expert weights stored / used, E"
    finish_gains(axes, values, [1.0, *frontier.measured("expansion")], f"Experts, G={granularity:g}", across)


def draw_granularity(axes: Axes, frontier: Frontier) -> None:
    """Draw what experts gain over a dense model of equal N and D, by their granularity."""
    expansion, _ = frontier.usual_shape
    values = sorted({granularity for other, granularity in frontier.shapes if other > 1})
    draw_gains(axes, frontier, values, lambda value: (expansion, value))
    title = f"Granularity, E={expansion:g}"
    finish_gains(axes, values, frontier.measured("granularity"), title, "experts that a token uses, G")


def draw_gains(axes: Axes, frontier: Frontier, values: Sequence[float], shape: Callable[[float], Shape]) -> None:
    """Draw the loss minus that of a dense model of equal N and D: dots are runs, lines are the law at two of them.

    These are the runs with the least and the most FLOPs; the bands are intervals over the resamples of the bootstrap.
    """
    shapes = [shape(value) for value in values]
    ends = [extreme(frontier.fit.points, key=training_flops) for extreme in (min, max)]
    lines = [gains_of(frontier.fit.law, end, shapes) for end in ends]
    for end, gains in zip(ends, lines, strict=True):
        colour = nearest_colour(frontier, end.training_flops)
        low, high = interval(np.array([gains_of(law, end, shapes) for law in frontier.fit.laws()]))
        axes.plot(values, gains, "-", color=colour)
        axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
        is_upper = gains[-1] == max(line[-1] for line in lines)
        write(axes, flops_text(end.training_flops), values[-1], gains[-1], (0, 6 if is_upper else -13), colour)
    draw_pairs(axes, frontier, values, shapes)


def draw_pairs(axes: Axes, frontier: Frontier, values: Sequence[float], shapes: Sequence[Shape]) -> None:
    """Draw the loss of each run with experts minus that of the dense run of equal N, D and seed."""
    dense = {(p.active_parameters, p.tokens, p.seed): p.loss for p in frontier.fit.points if p.expansion == 1}
    for value, shape in zip(values, shapes, strict=True):
        same = [p for p in frontier.fit.points if is_of(p, shape) and p.expansion > 1]
        pairs = [(p, dense.get((p.active_parameters, p.tokens, p.seed))) for p in same]
        for point, reference in pairs:
            if reference is not None:
                colour = nearest_colour(frontier, point.training_flops)
                axes.plot(value, point.loss - reference, "o", color=colour, markersize=4)


def training_flops(point: Point) -> float:
    """Return what a run cost."""
    return point.training_flops


def gains_of(law: Law, point: Point, shapes: Sequence[Shape]) -> Array:
    """Return what a law says of each shape at a run's N and D minus what it says of a dense one, (S,), nats/token."""
    expansion, granularity = np.array([(1.0, 1.0), *shapes], dtype=np.float64).T
    parameters, tokens = (np.full(len(expansion), value) for value in (point.active_parameters, point.tokens))
    losses = law.loss(Places(parameters, tokens, expansion, granularity))
    return np.asarray(losses[1:] - losses[0])


def finish_gains(axes: Axes, values: Sequence[float], measured: Sequence[float], title: str, across: str) -> None:
    """Set scales and names, and shade what was not measured."""
    from matplotlib.ticker import NullLocator

    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.22)
    for value in values:
        if value not in measured:
            axes.axvspan(value / 2**0.5, value * 2**0.5, color=INK, alpha=0.06, linewidth=0)
    axes.set(title=f"{title} (grey: not measured)", xlabel=across, ylabel="loss minus dense, nats/token")


def draw_drops(axes: Axes, sweep: CapacitySweep) -> None:
    """Draw the share of dropped assignments over the capacity factor, beside that of even and independent choices."""
    from matplotlib.ticker import PercentFormatter

    factors = [point.capacity_factor or 0.0 for point in sweep.limited]
    first = sweep.limited[0]
    across = np.linspace(min(factors), max(factors), FACTORS_DRAWN)
    even = [uniform_drop_rate(factor, first.seq_len, first.experts, first.top_k) for factor in across]
    axes.plot(across, even, color=INK, linewidth=1, linestyle="--")
    measured = [float("nan") if p.dropped_fraction is None else p.dropped_fraction for p in sweep.limited]
    axes.plot(factors, measured, "o-", color=VERMILLION, markersize=4)
    second = min(1, len(factors) - 1)  # the first dot is crowded by the other label
    write(axes, "measured", factors[second], measured[second], (6, 4), VERMILLION, ha="left")
    write(axes, "even choice", across[0], even[0], (6, -12), INK, ha="left")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axes.set(title=f"Drops ({first.shape}, {first.seq_len} tokens compete)", xlabel="capacity factor", ylabel="dropped")


def draw_limits(axes: Axes, sweep: CapacitySweep) -> None:
    """Draw the held-out loss over the capacity factor of the training, beside runs without a limit."""
    factors = [point.capacity_factor or 0.0 for point in sweep.limited]
    axes.plot(factors, [point.loss for point in sweep.limited], "o-", color=VERMILLION, markersize=4)
    for place, point in enumerate(sweep.unlimited):
        axes.axhline(point.loss, color=BLUE, linewidth=1.2)
        if place == 0:
            write(axes, "dropless, one line per seed", max(factors), point.loss, (0, 4), BLUE, ha="right")
    axes.set(title="Loss under a limit", xlabel="capacity factor in training", ylabel="loss, nats per token")


def budgets(frontier: Frontier) -> list[tuple[float, Any]]:
    """Return the budgets with their colours, dark to light."""
    from matplotlib import colormaps

    found = frontier.budgets
    return [(budget, colormaps["viridis"](0.8 * place / (len(found) - 1))) for place, budget in enumerate(found)]


def nearest_colour(frontier: Frontier, flops: float) -> Any:
    """Return the colour of the budget closest to a number of FLOPs."""
    return min(budgets(frontier), key=lambda found: abs(np.log(found[0] / flops)))[1]


def is_of(point: Point, shape: Shape) -> bool:
    """Whether a run without a limit has this (E, G)."""
    return point.capacity_factor is None and (point.expansion, float(point.granularity)) == shape


def write(
    axes: Axes, text: str, x: float, y: float, offset: tuple[float, float], colour: Any = INK, ha: str = "center"
) -> None:
    """Write a direct label near a place, in the colour of what it names."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=colour, ha=ha, fontsize=8)


def flops_text(flops: float) -> str:
    """Return a number of FLOPs for people."""
    units = {1e18: "EFLOPs", 1e15: "PFLOPs", 1e12: "TFLOPs"}
    unit = next((unit for unit in units if flops >= unit / 10), 1e12)
    return f"{flops / unit:.2g} {units[unit]}"
