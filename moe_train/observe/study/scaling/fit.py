"""Fitting a law of scaling: which constants the points can carry, their values, and how sure they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_train.errors import DataError, Problem
from moe_train.observe.study.scaling.law import CONSTANTS, Array, Law, Places, Scales, readable
from moe_train.observe.study.scaling.points import Point

LEAST_LEVELS = 3
"""Sizes and numbers of tokens without which a power and a floor cannot be told apart."""
SPARE_POINTS = 4
"""Points beyond the number of constants, without which residuals say nothing."""
USUAL_RESIDUAL = 0.01
"""Relative residual beyond which a point pulls linearly, not quadratically (soft L1): about as far apart lie runs that
differ in the seed alone."""
RESAMPLES = 500
"""Of the bootstrap: the 2.5 % ends of the intervals then have 12 resamples beyond them."""
CONFIDENCE = 0.95
LOWER = {"c": 0.0, "A": -9.0, "alpha": 0.0, "mu": -1.5, "gamma": -1.5, "B": -9.0, "beta": 0.0, "omega": -1.5}
UPPER = {"c": np.inf, "A": 4.0, "alpha": 3.0, "mu": 1.5, "gamma": 1.5, "B": 4.0, "beta": 3.0, "omega": 1.5}
"""Bounds of the constants (A and B: of their logarithms); c lies below the smallest loss besides."""


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    Attributes:
        law: the best one.
        free: names of the fitted constants; the others are zero.
        points: those that it was fitted to.
        residuals: log of measured over predicted loss, (P,).
        resampled: constants of each resample of the bootstrap, (R, 8), A and B as logarithms.
        covariance: of the free constants, from the Jacobian, (F, F); A and B as logarithms.
    """

    law: Law
    free: tuple[str, ...]
    points: tuple[Point, ...]
    residuals: Array
    resampled: Array
    covariance: Array

    @property
    def rms(self) -> float:
        """Root mean square of the relative residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def r_squared(self) -> float:
        """Share of the losses' variance that the law explains."""
        losses = np.array([point.loss for point in self.points])
        errors = losses - losses / np.exp(self.residuals)
        return float(1 - np.sum(errors**2) / np.sum((losses - losses.mean()) ** 2))

    @property
    def bootstrap_intervals(self) -> dict[str, tuple[float, float]]:
        """The interval of each free constant over the resamples."""
        ends = interval(readable(self.resampled))
        return {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(CONSTANTS) if name in self.free}

    @property
    def jacobian_intervals(self) -> dict[str, tuple[float, float]]:
        """The same from the Jacobian at the best law: where it is not close to the other, the law bends too much."""
        from scipy.special import stdtrit  # Student's t; scipy.stats takes seconds to load

        spare = len(self.points) - len(self.free)
        wide = stdtrit(spare, (1 + CONFIDENCE) / 2) * np.sqrt(np.diag(self.covariance))
        places = [CONSTANTS.index(name) for name in self.free]
        found = {}
        for name, place, width in zip(self.free, places, wide, strict=True):
            ends = self.law.vector[place] + np.array([-width, width])
            found[name] = tuple(np.exp(ends).tolist() if name in ("A", "B") else ends.tolist())
        return found

    @property
    def at_bound(self) -> tuple[str, ...]:
        """Free constants that lie at the end of what they may be: their intervals are one-sided."""
        values = dict(zip(CONSTANTS, self.law.vector.tolist(), strict=True))
        return tuple(n for n in self.free if min(values[n] - LOWER[n], UPPER[n] - values[n]) < 1e-4)

    def laws(self) -> list[Law]:
        """Return the law of each resample."""
        return [Law(vector, self.law.scales) for vector in self.resampled]


@dataclass(frozen=True)
class Prediction:
    """A loss that the law foretells.

    Attributes:
        loss: nats per token.
        low, high: interval for one more run: uncertainty of the law and noise of a run together.
    """

    loss: float
    low: float
    high: float


def split(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return the points to fit, and those with the most training FLOPs, which the law has to predict.

    Runs with a capacity limit in training are in neither: what they drop is another question.
    """
    unlimited = [point for point in points if point.capacity_factor is None]
    most = max((point.training_flops for point in unlimited), default=0.0)
    return [p for p in unlimited if p.training_flops < most], [p for p in unlimited if p.training_flops == most]


def fit_law(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit a law to the points.

    Args:
        points: without the held-out ones.
        resamples: of the bootstrap: points are drawn with replacement.
        seed: of the bootstrap's draws.

    Raises:
        DataError: the points are too few, or too alike; names everything that is missing.
    """
    free = free_constants(points)
    require_enough(points, free)
    scales = Scales.of(points)
    places, losses = Places.of(points), np.array([point.loss for point in points])
    tried = [solve(start, free, places, losses, scales) for start in starts(losses)]
    vector = min(tried, key=lambda found: found[0])[1]
    law = Law(vector, scales)
    residuals = np.log(losses / law.loss(places))
    draw = np.random.default_rng(seed)
    drawn = (draw.integers(len(points), size=len(points)) for _ in range(resamples))
    resampled = [solve(vector, free, taken(places, rows), losses[rows], scales)[1] for rows in drawn]
    return Fit(law, free, tuple(points), residuals, np.array(resampled), covariance(law, free, places, residuals))


def free_constants(points: Sequence[Point]) -> tuple[str, ...]:
    """Return the constants that the points can tell; those of experts need several E, that of granularity several G."""
    experts = len({point.expansion for point in points}) > 1
    granularity = len({point.granularity for point in points if point.expansion > 1}) > 1
    absent = {"mu": not experts, "omega": not experts, "gamma": not granularity}
    return tuple(name for name in CONSTANTS if not absent.get(name, False))


def require_enough(points: Sequence[Point], free: Sequence[str]) -> None:
    """Refuse points that cannot carry the law.

    Raises:
        DataError: with everything that is missing.
    """
    problems = []
    for what, name in (("sizes of the model", "active_parameters"), ("numbers of tokens", "tokens")):
        levels = len({getattr(point, name) for point in points})
        if levels < LEAST_LEVELS:
            rule = f"{levels} in the finished runs without the largest, and a law needs at least {LEAST_LEVELS}"
            problems.append(Problem(f"study: {what}", None, rule, "run more of experiment=scaling_laws"))
    needed = len(free) + SPARE_POINTS
    if len(points) < needed:
        rule = f"{len(points)} without the largest and without a capacity limit, and a law of {len(free)} constants "
        rule += f"needs at least {needed}"
        problems.append(Problem("study: finished runs", None, rule, "run more of experiment=scaling_laws"))
    if problems:
        raise DataError(problems)


def starts(losses: Array) -> list[Array]:
    """Return vectors to start from: floors and exponents far apart, since the sum of squares has several valleys."""
    found = []
    for floor, alpha, beta in itertools.product((0.2, 0.6, 0.9), (0.1, 0.5), (0.1, 0.5)):
        rest = np.log(max(1e-3, float(np.median(losses)) - floor * float(losses.min())) / 2)
        found.append(np.array([floor * losses.min(), rest, alpha, 0.0, 0.0, rest, beta, 0.0]))
    return found


def solve(start: Array, free: Sequence[str], places: Places, losses: Array, scales: Scales) -> tuple[float, Array]:
    """Return the least cost that is reached from a vector, and the vector there; what is not free is zero."""
    from scipy.optimize import least_squares

    indices = [CONSTANTS.index(name) for name in free]
    low, high = (np.array([bounds[name] for name in free]) for bounds in (LOWER, UPPER))
    high[0] = losses.min()

    def whole(values: Array) -> Law:
        vector = np.zeros(len(CONSTANTS))
        vector[indices] = values
        return Law(vector, scales)

    def errors(values: Array) -> Array:
        return np.log(whole(values).loss(places) / losses)

    def jacobian(values: Array) -> Array:
        law = whole(values)
        return law.slopes(places)[:, indices] / law.loss(places)[:, None]

    inside = np.clip(start[indices], low, high)
    found = least_squares(errors, inside, jacobian, (low, high), loss="soft_l1", f_scale=USUAL_RESIDUAL, x_scale="jac")
    return float(found.cost), whole(found.x).vector


def taken(places: Places, rows: NDArray[np.int64]) -> Places:
    """Return some of the places, in this order."""
    return Places(places.parameters[rows], places.tokens[rows], places.expansion[rows], places.granularity[rows])


def covariance(law: Law, free: Sequence[str], places: Places, residuals: Array) -> Array:
    """Return the covariance of the free constants in the linear approximation: s² (JᵀJ)⁻¹."""
    slopes = law.slopes(places)[:, [CONSTANTS.index(name) for name in free]] / law.loss(places)[:, None]
    variance = np.sum(residuals**2) / (len(residuals) - len(free))
    return np.asarray(variance * np.linalg.pinv(slopes.T @ slopes))


def predict(fit: Fit, point: Point, seed: int = 0) -> Prediction:
    """Return what the law says of a run that it was not fitted to."""
    places = Places.of([point])
    losses = np.array([law.loss(places)[0] for law in fit.laws()])
    # Residuals of a fit are smaller than those of a new run, by the share of the points that the constants took up.
    wider = np.sqrt(len(fit.points) / (len(fit.points) - len(fit.free)))
    noise = np.random.default_rng(seed).choice(fit.residuals * wider, len(losses))
    low, high = interval(losses * np.exp(noise))
    return Prediction(float(fit.law.loss(places)[0]), float(low), float(high))


def interval(values: Array) -> Array:
    """Return the ends of the middle CONFIDENCE of resamples (R, ...): shape (2, ...)."""
    return np.asarray(np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0))
