"""What a capacity factor costs: assignments that find no room, and the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.observe.study.scaling.points import Point


@dataclass(frozen=True)
class CapacitySweep:
    """Runs that differ in the capacity factor alone.

    Attributes:
        limited: those with a limit, by factor.
        unlimited: the same model, trained on as many tokens without one; one per seed.
    """

    limited: tuple[Point, ...]
    unlimited: tuple[Point, ...]


def capacity_sweep(points: Sequence[Point]) -> CapacitySweep | None:
    """Return the model with the most runs with a limit, or None when none has one."""
    limited = [point for point in points if point.capacity_factor is not None]
    if not limited:
        return None
    kinds = [kind(point) for point in limited]
    usual = max(sorted(set(kinds)), key=kinds.count)
    chosen = sorted((p for p in limited if kind(p) == usual), key=lambda p: p.capacity_factor or 0.0)
    return CapacitySweep(tuple(chosen), tuple(p for p in points if p.capacity_factor is None and kind(p) == usual))


def kind(point: Point) -> tuple[int, int, int, int]:
    """Return what the runs of a sweep have in common."""
    return point.active_parameters, point.experts, point.top_k, point.tokens


def uniform_drop_rate(factor: float, seq_len: int, experts: int, top_k: int) -> float:
    """Return the share of assignments that find no room where every token chooses evenly and by itself.

    An expert is chosen by X ~ Binomial(n, K / E) of a sequence's n tokens and takes C = ceil(factor · n · K / E): the
    share is the mean of max(0, X - C) over that of X.

    Args:
        factor: of the capacity.
        seq_len: n; the tokens that compete.
        experts: E.
        top_k: K.
    """
    from scipy.special import bdtrc

    chance = top_k / experts
    capacity = math.ceil(factor * seq_len * chance)
    # The mean excess over C is the sum of the chances that X exceeds C, C + 1, ..., n - 1.
    excess = bdtrc(np.arange(capacity, seq_len), seq_len, chance).sum()
    return float(excess / (seq_len * chance))
