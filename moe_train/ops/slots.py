"""Moving rows into buffers of fixed size, and back by summation.

What `ops.permute` does, for sizes that must not depend on the data.
`fill_slots` and `sum_slots` are each other's adjoint over a `SlotMap`: neither needs atomics, waits for the device, or
leaves the order of a sum open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SlotMap:
    """Places of the copies of T tokens in a buffer of N rows.

    Attributes:
        slots_TK: [T, K] int64, place of each copy, N for none; no place is taken twice.
        tokens_N: [N] int64, the token in each place, T in an empty one.
    """

    slots_TK: Tensor
    tokens_N: Tensor


def map_slots(slots_TK: Tensor, num_slots: int) -> SlotMap:
    """Build the map from the places [T, K] of all copies, ``num_slots`` for none."""
    num_tokens, num_choices = slots_TK.shape
    copies_A = torch.arange(slots_TK.numel(), device=slots_TK.device) // num_choices
    # Copies without a place all write to one row more, which is cut off.
    tokens = torch.full((num_slots + 1,), num_tokens, dtype=torch.int64, device=slots_TK.device)
    return SlotMap(slots_TK, tokens.scatter_(0, slots_TK.flatten(), copies_A)[:num_slots])


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slot_map: SlotMap) -> Tensor:
        ctx.slot_map = slot_map
        return _fill(x_TD, slot_map)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_ND, ctx.slot_map), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, slot_map: SlotMap) -> Tensor:
        ctx.slot_map = slot_map
        return _sum(y_ND, slot_map)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return _fill(grad_TD, ctx.slot_map), None


def _fill(x_TD: Tensor, slot_map: SlotMap) -> Tensor:
    empty_N1 = (slot_map.tokens_N == len(x_TD)).unsqueeze(1)
    return x_TD.index_select(0, slot_map.tokens_N.clamp(max=len(x_TD) - 1)).masked_fill_(empty_N1, 0)


def _sum(y_ND: Tensor, slot_map: SlotMap) -> Tensor:
    present_TK = slot_map.slots_TK < len(y_ND)
    places_TK = torch.where(present_TK, slot_map.slots_TK, 0)
    return F.embedding_bag(places_TK, y_ND.contiguous(), mode="sum", per_sample_weights=present_TK.to(y_ND.dtype))


def fill_slots(x_TD: Tensor, slot_map: SlotMap) -> Tensor:
    """Copy each token [T, D] to its places [N, D]; empty ones are zeros. Its gradient is `sum_slots`."""
    out: Tensor = _Fill.apply(x_TD, slot_map)  # type: ignore[no-untyped-call]
    return out


def sum_slots(y_ND: Tensor, slot_map: SlotMap) -> Tensor:
    """Add up the places of each token, in order of its choices: [N, D] -> [T, D]. Its gradient is `fill_slots`."""
    out: Tensor = _Sum.apply(y_ND, slot_map)  # type: ignore[no-untyped-call]
    return out


def fill_slots_reference(x_TD: Tensor, slots_TK: Tensor, num_slots: int) -> Tensor:
    """Do what `fill_slots` does, copy by copy."""
    out_ND = x_TD.new_zeros(num_slots, x_TD.shape[1])
    for x_D, row in zip(x_TD, slots_TK.tolist(), strict=True):
        for place in row:
            if place < num_slots:
                out_ND[place] = x_D
    return out_ND


def sum_slots_reference(y_ND: Tensor, slots_TK: Tensor) -> Tensor:
    """Do what `sum_slots` does, copy by copy."""
    out_TD = y_ND.new_zeros(len(slots_TK), y_ND.shape[1])
    for token, row in enumerate(slots_TK.tolist()):
        for place in row:
            if place < len(y_ND):
                out_TD[token] = out_TD[token] + y_ND[place]
    return out_TD
