"""Rows of a rank's experts in segments, one per expert, filled up to sizes for which products are quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.ops.permute import RowMap, map_rows

LEAST_STEP = 16
"""Sizes of segments are multiples of this many rows."""
STEPS = 16
"""Steps between a size and its double: a segment is longer than its expert's rows by 1/16 at most (and LEAST_STEP)."""


@dataclass(frozen=True)
class Segments:
    """N rows, each a copy of one of R tokens for one expert, sorted by expert.

    Attributes:
        rows: the map. Rows that only fill a segment up have R · K as their choice; they copy the token of the segment's
            first row, so that an infinite token spoils no expert but those that it chose, and enter no token's sum.
    """

    rows: RowMap

    @property
    def num_rows(self) -> int:
        """Number of rows N."""
        return len(self.rows.tokens_N)

    def weights_of(self, weights_RK: Tensor) -> Tensor:
        """Return the weight [N] of each row: zero for rows that fill up."""
        with_zero = torch.cat([weights_RK.flatten(), weights_RK.new_zeros(1)])
        return with_zero.index_select(0, self.rows.choices_N)

    def by_choice(self, values_N: Tensor, weights_RK: Tensor) -> Tensor:
        """Return what each choice's row has, [R, K] like the weights: zero for a choice without a row."""
        by_choice = weights_RK.new_zeros(weights_RK.numel() + 1)
        by_choice.scatter_(0, self.rows.choices_N, values_N.to(by_choice.dtype))
        return by_choice[:-1].view_as(weights_RK)


def counts_of(experts_RK: Tensor, num_held: int) -> Tensor:
    """Return [L] int64: choices of each expert held here; ``num_held`` stands for none. Does not wait."""
    flat = experts_RK.flatten()
    counts = torch.zeros(num_held + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_held]


def exact_segments(experts_RK: Tensor, num_held: int, num_rows: int) -> Segments:
    """Return segments without a row too many."""
    return Segments(map_rows(experts_RK, num_held, num_rows))


def round_up(count: int) -> int:
    """Return the next size of which there are few: at most `STEPS` between a number and its double.

    oneDNN builds a kernel for each new number of rows in bf16 and keeps a thousand of them. Where each count had its
    own, kernels would be built in every step, and building one takes longer than running it.
    """
    step = max(LEAST_STEP, (1 << (count.bit_length() - 1)) // STEPS) if count else LEAST_STEP
    return -(-count // step) * step


def filled_up(segments: Segments, counts_L: Tensor, sizes: Sequence[int], num_choices: int) -> Segments:
    """Return segments with ``sizes`` rows.

    Args:
        segments: exact ones.
        counts_L: [L] int64, their rows.
        sizes: of the new ones, none less than its count.
        num_choices: R · K.
    """
    rows, sizes_L = segments.rows, torch.tensor(sizes, device=counts_L.device)
    firsts_L, starts_L = torch.cumsum(counts_L, 0) - counts_L, torch.cumsum(sizes_L, 0) - sizes_L
    expert_N = torch.repeat_interleave(sizes_L, output_size=sum(sizes))
    place_N = torch.arange(len(expert_N), device=counts_L.device) - starts_L[expert_N]
    fills_N = place_N >= counts_L[expert_N]
    # An expert without rows has none to repeat: whatever token is there.
    source_N = (firsts_L[expert_N] + place_N.masked_fill(fills_N, 0)).clamp(max=len(rows.choices_N) - 1)
    moved_A = torch.repeat_interleave(starts_L - firsts_L, counts_L, output_size=len(rows.choices_N))
    moved_A += torch.arange(len(moved_A), device=counts_L.device)
    return Segments(
        replace(
            rows,
            choices_N=rows.choices_N[source_N].masked_fill_(fills_N, num_choices),
            tokens_N=rows.tokens_N[source_N],
            slots_N=moved_A[rows.slots_N],
        )
    )
