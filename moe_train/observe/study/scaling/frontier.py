"""What a law says to do with a budget: isoFLOP curves, the best size, and the best experts and granularity.

A budget of training FLOPs buys tokens: D = budget / FLOPs per token. Routers are paid for: their cost grows with E · G,
the number of experts, so that ever more and ever finer experts do not come for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.study.scaling.fit import Fit, interval
from moe_train.observe.study.scaling.law import Array, Law, Places
from moe_train.observe.study.scaling.points import Point

SIZES_DRAWN = 121
"""Sizes at which a curve is computed."""
BEYOND = 4.0
"""How far beyond the measured sizes curves go, as a factor: what lies there is marked as extrapolated."""
OCTAVE = 2.0
"""How far beyond the measured E and G the optimum is looked for, as a factor."""
BUDGETS = 5


@dataclass(frozen=True)
class Costs:
    """Training FLOPs per token of models between and near the measured ones.

    Both are powers of N through the measured models: depth, width, head and attention grow with N as they did there.

    Attributes:
        dense: exponent, and logarithm of the factor, of the FLOPs without routers.
        router: the same of what a router costs per expert; None where no point has one.
    """

    dense: tuple[float, float]
    router: tuple[float, float] | None

    @classmethod
    def of(cls, points: Sequence[Point]) -> Costs:
        """Return the powers of N that lie closest to what points of at least two sizes cost."""
        routed = [point for point in points if point.experts]
        dense = fitted_power(points, [point.flops_per_token - point.router_flops for point in points])
        several = len({point.active_parameters for point in routed}) > 1
        return cls(dense, fitted_power(routed, [p.router_flops / p.experts for p in routed]) if several else None)

    def per_token(self, parameters: Array, expansion: Array, granularity: Array) -> Array:
        """Return FLOPs per token; the arguments broadcast."""
        plain = evaluate_power(self.dense, parameters)
        if self.router is None:
            return plain + np.zeros(np.broadcast_shapes(parameters.shape, expansion.shape, granularity.shape))
        experts = np.where(expansion > 1, expansion * granularity, 0.0)
        return plain + evaluate_power(self.router, parameters) * experts


def fitted_power(points: Sequence[Point], values: Sequence[float]) -> tuple[float, float]:
    """Return exponent and log factor of the power of N closest to some values."""
    exponent, factor = np.polyfit(np.log([point.active_parameters for point in points]), np.log(values), 1)
    return float(exponent), float(factor)


def evaluate_power(power: tuple[float, float], parameters: Array) -> Array:
    """Return what `fitted_power` found at other N."""
    return np.asarray(np.exp(power[1]) * parameters ** power[0])


@dataclass(frozen=True)
class Curve:
    """Loss over size at one budget and shape.

    Attributes:
        budget: training FLOPs.
        parameters: N, ascending (M,).
        tokens: D that the budget buys, (M,).
        losses: nats per token, (M,).
        is_measured: whether N and D lie in the measured ranges, (M,).
    """

    budget: float
    parameters: Array
    tokens: Array
    losses: Array
    is_measured: NDArray[np.bool_]

    @property
    def best(self) -> int:
        """Index of the least loss."""
        return int(np.argmin(self.losses))


@dataclass(frozen=True)
class Choice:
    """What a budget is best spent on.

    Attributes:
        budget: training FLOPs.
        parameters: N.
        tokens: D.
        expansion: E.
        granularity: G.
        loss: of the best law, nats per token.
        low, high: interval of that loss over the resamples, this choice being kept.
        agreeing: share of the resamples that choose the same E and G.
        beyond: names of N, D, E and G that lie outside of what was measured, or at the end of what was looked at.
    """

    budget: float
    parameters: float
    tokens: float
    expansion: float
    granularity: float
    loss: float
    low: float
    high: float
    agreeing: float
    beyond: tuple[str, ...]


@dataclass(frozen=True)
class Frontier:
    """A fitted law with the costs of models.

    Attributes:
        fit: the law.
        costs: FLOPs per token.
    """

    fit: Fit
    costs: Costs

    @classmethod
    def of(cls, fit: Fit) -> Frontier:
        """Return the frontier of the points that a law was fitted to."""
        return cls(fit, Costs.of(fit.points))

    @cached_property
    def sizes(self) -> Array:
        """Sizes N to choose from, evenly spread in the logarithm."""
        low, high = self.range("active_parameters")
        return np.asarray(np.geomspace(low / BEYOND, high * BEYOND, SIZES_DRAWN))

    @cached_property
    def shapes(self) -> list[tuple[float, float]]:
        """Pairs (E, G) to choose from: an octave beyond what was measured; only that where the law cannot tell."""
        experts, granularities = self.measured("expansion"), self.measured("granularity")
        if "gamma" in self.fit.free:
            granularities = octaves(granularities)
        if "mu" not in self.fit.free:
            return [(e, g) for e in experts for g in granularities] or [(1.0, 1.0)]
        return [(1.0, 1.0), *((e, g) for e in octaves(experts) if e > 1 for g in granularities)]

    @property
    def usual_shape(self) -> tuple[float, float]:
        """The (E, G) with experts of most points, dense where there are none: whose isoFLOP curves are drawn."""
        routed = [(p.expansion, float(p.granularity)) for p in self.fit.points if p.experts]
        return max(sorted(set(routed)), key=routed.count) if routed else (1.0, 1.0)

    @property
    def budgets(self) -> list[float]:
        """Training FLOPs from the least to the most that a point of the fit had, evenly spread in the logarithm."""
        return [float(value) for value in np.geomspace(*self.range("training_flops"), BUDGETS)]

    def range(self, name: str) -> tuple[float, float]:
        """Return the least and the largest of what the fitted points have."""
        values = [float(getattr(point, name)) for point in self.fit.points]
        return min(values), max(values)

    def measured(self, name: str) -> list[float]:
        """Return the values of E or G of points with experts."""
        return sorted({float(getattr(point, name)) for point in self.fit.points if point.experts})

    def surface(self, budget: float, shapes: Sequence[tuple[float, float]]) -> Places:
        """Return all sizes with each of S pairs (E, G), and the tokens that a budget buys them: arrays of (S, M)."""
        expansion, granularity = np.array(shapes, dtype=np.float64).T[:, :, None]
        parameters = np.tile(self.sizes, (len(shapes), 1))
        tokens = budget / self.costs.per_token(parameters, expansion, granularity)
        return Places(parameters, tokens, expansion, granularity)

    def least(self, budget: float, shapes: Sequence[tuple[float, float]], law: Law) -> Array:
        """Return what a law says of each (E, G) at its best size: (S,), nats per token."""
        return np.asarray(law.loss(self.surface(budget, shapes)).min(axis=1))

    def curve(self, budget: float, shape: tuple[float, float]) -> Curve:
        """Return the loss over size for one (E, G)."""
        places = self.surface(budget, [shape])
        tokens, losses = places.tokens[0], self.fit.law.loss(places)[0]
        inside = is_inside(self.sizes, self.range("active_parameters")) & is_inside(tokens, self.range("tokens"))
        return Curve(budget, self.sizes, tokens, losses, inside)

    def choose(self, budget: float) -> Choice:
        """Return the size and the shape of the least loss at a budget, and how sure that is."""
        chosen = int(np.argmin(self.least(budget, self.shapes, self.fit.law)))
        shape = self.shapes[chosen]
        curve, places = self.curve(budget, shape), self.surface(budget, self.shapes)
        others = np.array([law.loss(places) for law in self.fit.laws()])
        low, high = interval(others[:, chosen, curve.best])
        return Choice(
            budget=budget,
            parameters=float(curve.parameters[curve.best]),
            tokens=float(curve.tokens[curve.best]),
            expansion=shape[0],
            granularity=shape[1],
            loss=float(curve.losses[curve.best]),
            low=float(low),
            high=float(high),
            agreeing=float(np.mean(others.min(axis=2).argmin(axis=1) == chosen)),
            beyond=self.beyond(curve, shape),
        )

    def beyond(self, curve: Curve, shape: tuple[float, float]) -> tuple[str, ...]:
        """Return which of N, D, E and G of a curve's optimum were not measured."""
        values = {
            "N": (curve.parameters[curve.best], self.range("active_parameters")),
            "D": (curve.tokens[curve.best], self.range("tokens")),
        }
        names = [name for name, (value, ends) in values.items() if not is_inside(np.asarray(value), ends)]
        names += ["E"] * (shape[0] not in {point.expansion for point in self.fit.points})
        names += ["G"] * (shape[0] > 1 and shape[1] not in self.measured("granularity"))
        return tuple(names)


def is_inside(values: Array, ends: tuple[float, float]) -> NDArray[np.bool_]:
    """Whether values lie between two ends, to a relative error."""
    return np.asarray((values >= ends[0] * (1 - 1e-9)) & (values <= ends[1] * (1 + 1e-9)))


def octaves(measured: Sequence[float]) -> list[float]:
    """Return the measured values with one more on either side, a factor of OCTAVE away; none below one."""
    if not measured:
        return []
    return [value for value in (measured[0] / OCTAVE, *measured, measured[-1] * OCTAVE) if value >= 1]
