"""Random numbers that belong to tokens, not to processes: the same draw on every layout and in every recomputation.

A draw is the output number n of the generator SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is a hash of
seed + n: any output can be had without those before it. Integer arithmetic alone, so that all devices agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's step: the golden ratio in 64 bits."""
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
MASK = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """Return one 63-bit seed from several numbers (seed, step, layer, purpose), each of which changes all of it."""
    state = 0
    for part in parts:
        state = (state + GAMMA + part) & MASK
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
            state = ((state ^ (state >> shift)) * multiplier) & MASK
    return state >> 1


def random_bits(seed: int, counters: Tensor) -> Tensor:
    """Return outputs of SplitMix64 as int64 of the shape of ``counters``.

    Args:
        seed: of the generator.
        counters: int64, which output each place gets, from 0.
    """
    # In place: jitter draws a number per token and channel. int64 products wrap around, as they should.
    bits = (counters + 1).mul_(signed(GAMMA)).add_(signed(seed))
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        # Torch shifts in copies of the sign; SplitMix64 wants zeros.
        shifted = (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        bits.bitwise_xor_(shifted).mul_(signed(multiplier))
    return bits


def random_bits_reference(seed: int, counter: int) -> int:
    """Return one output, as an unsigned number, by Python's integers."""
    state = (seed + (counter + 1) * GAMMA) & MASK
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = ((state ^ (state >> shift)) * multiplier) & MASK
    return state


def uniform(seed: int, counters: Tensor) -> Tensor:
    """Return fp32 numbers strictly between 0 and 1: the upper 23 bits of the outputs, and a half."""
    return ((random_bits(seed, counters) >> 41) & 0x7FFFFF).to(torch.float32).add(0.5).mul(2.0**-23)


def signed(value: int) -> int:
    """Return the 64-bit number that two's complement reads from the bits of an unsigned one."""
    return value - (1 << 64) if value >> 63 else value
