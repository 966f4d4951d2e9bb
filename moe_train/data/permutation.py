"""A random order of any number of items that needs no memory: item i is computed, not looked up."""

from __future__ import annotations

import numpy as np

ROUNDS = 6
"""Four rounds make a Feistel network a strong pseudo-random permutation (Luby and Rackoff 1988); two more are cheap
and help small domains."""


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return which item stands at each position of a shuffled range(size).

    A balanced Feistel network permutes the smallest power of four that holds ``size``; values outside are permuted
    again until they fall inside (cycle walking, Black and Rogaway 2002), which keeps it a bijection.

    Args:
        positions: int64 of any shape, in [0, size).
        size: number of items.
        seed: chooses the order.
        epoch: chooses another order for the same seed.

    Returns:
        int64, shape of ``positions``.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = round_keys(seed, epoch)
    items = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := items >= size).any():
        items[outside] = _feistel(items[outside], half_bits, keys)
    return items.astype(np.int64)


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return one key per round, uint64 [ROUNDS]."""
    chain = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    return splitmix64(chain + np.arange(ROUNDS, dtype=np.uint64))


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Return the output function of SplitMix64 (Steele, Lea and Flood 2014), uint64 to uint64, modulo 2^64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _feistel(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (splitmix64(right ^ key) & mask)
    return (left << half_bits) | right
