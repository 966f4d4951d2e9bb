"""Integers that ride beside values in one buffer, so that both take one collective.

A row holds its riders, then the bits of its values, all as 32-bit integers. The gradient of the values travels alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BYTES = 4
"""Of a rider."""


def pack(values_NK: Tensor, riders_NM: Tensor | None) -> Tensor:
    """Return what travels: [N, M + K · words] int32, or the values alone where nothing rides along.

    Args:
        values_NK: [N, K] of a dtype of four or eight bytes, that is of one or two words.
        riders_NM: [N, M] integers below 2^31, or None.
    """
    if riders_NM is None:
        return values_NK
    assert values_NK.element_size() % WORD_BYTES == 0, f"riders cannot be beside {values_NK.dtype}"
    rows, words = len(values_NK), values_NK.shape[1] * values_NK.element_size() // WORD_BYTES
    # By way of one row: a single column is contiguous whatever its strides, which then cannot be those of words.
    bits_NW = values_NK.contiguous().flatten().view(torch.int32).view(rows, words)
    return torch.cat([riders_NM.to(torch.int32), bits_NW], dim=1)


def values_of(packed_NW: Tensor, num_riders: int, dtype: torch.dtype) -> Tensor:
    """Return the values [N, K] of what arrived, as a tensor of their own."""
    # A copy in any case: part of a single row is contiguous as it is, but may begin in the middle of a long word.
    return packed_NW[:, num_riders:].clone(memory_format=torch.contiguous_format).view(dtype)


def riders_of(packed_NW: Tensor, num_riders: int) -> Tensor:
    """Return the riders [N, M] int64 of what arrived."""
    return packed_NW[:, :num_riders].to(torch.int64)
