"""Made-up points of a study of scaling whose law is known."""

from __future__ import annotations

import numpy as np

from moe_train.observe.study.scaling.law import Law, Places, Scales
from moe_train.observe.study.scaling.points import Point

SCALES = Scales(parameters=150_000.0, tokens=700_000.0, granularity=2.0)
TRUTH = Law(np.array([1.2, np.log(0.35), 0.35, 0.12, 0.05, np.log(0.4), 0.5, 0.04]), SCALES)
"""c, log A, alpha, mu, gamma, log B, beta, omega."""
SIZES, TOKENS = (55_000, 146_000, 350_000), (300_000, 740_000, 1_740_000)
SHAPES = ((1, 1), (2, 2), (4, 2), (8, 2), (4, 4), (4, 8))
"""Pairs (E, G), dense first."""
WIDTH = 192
"""Width times layers: what a router multiplies per expert."""


def made(
    parameters: int,
    tokens: int,
    shape: tuple[int, int] = (1, 1),
    law: Law = TRUTH,
    noise: float = 0.0,
    seed: int = 0,
    factor: float | None = None,
    dropped: float | None = None,
) -> Point:
    """A point on a law, or off it by a relative ``noise``."""
    expansion, granularity = shape
    experts = expansion * granularity if expansion > 1 else 0
    router = 6.0 * WIDTH * experts
    places = Places(*(np.array([float(value)]) for value in (parameters, tokens, expansion, granularity)))
    return Point(
        name=f"n{parameters}-d{tokens}-e{expansion}-g{granularity}-c{factor}-s{seed}",
        seed=seed,
        active_parameters=parameters,
        total_parameters=parameters * expansion,
        experts=experts,
        top_k=granularity if experts else 0,
        tokens=tokens,
        seq_len=128,
        flops_per_token=6.0 * parameters + router,
        router_flops=router,
        capacity_factor=factor,
        loss=float(law.loss(places)[0] * (1 + noise)),
        dropped_fraction=dropped,
    )


def grid(
    noise: float = 0.0, draw: int = 0, shapes: tuple[tuple[int, int], ...] = SHAPES, law: Law = TRUTH
) -> list[Point]:
    """Every shape in every size and length, with independent noise of a standard deviation."""
    random = np.random.default_rng(draw)
    places = [(n, d, shape) for n in SIZES for d in TOKENS for shape in shapes]
    return [made(n, d, shape, law, noise * float(random.normal())) for n, d, shape in places]


HELD_OUT = made(990_000, 1_740_000, (4, 2))
"""More FLOPs than any point of the grid."""


def whole_study(noise: float = 0.004) -> list[Point]:
    """A grid, two more seeds of one point, a sweep of capacity factors, and a held-out run."""
    seeds = [made(146_000, 740_000, (4, 2), noise=noise * sign, seed=1 + (sign > 0)) for sign in (-1, 1)]
    factors = (0.5, 1.0, 2.0)
    limited = [made(146_000, 740_000, (4, 2), noise=0.02 / f, factor=f, dropped=0.5 - f / 4) for f in factors]
    return [*grid(noise), *seeds, *limited, HELD_OUT]
