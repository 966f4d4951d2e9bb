"""Moving rows: one row per (token, destination), and back by summation.

A token may have several destinations (experts, or ranks). `RowMap` holds where each row comes from and which rows
belong to each token; `gather_rows` and `sum_rows` are each other's adjoint over it, so that neither direction needs
atomics and the order of every sum is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RowMap:
    """N rows made of T tokens, sorted by destination and, within one, by token.

    Attributes:
        choices_N: [N] int64, index of the row's choice in the flattened [T, M] table of destinations.
        tokens_N: [N] int64, token that the row is a copy of.
        slots_N: [N] int64, rows in order of (token, choice): the rows of token t are one run of this list.
        starts_T: [T] int64, where each token's run begins in slots_N.
    """

    choices_N: Tensor
    tokens_N: Tensor
    slots_N: Tensor
    starts_T: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.starts_T.numel()


def map_rows(destinations_TM: Tensor, num_destinations: int, num_rows: int) -> RowMap:
    """Build the map by one stable sort of small integers; no one-hot table, and no wait for the device.

    Args:
        destinations_TM: [T, M] int64, destination of each choice, or ``num_destinations`` for none.
        num_destinations: number of destinations.
        num_rows: number N of choices which have a destination, as the caller knows it.
    """
    num_choices = destinations_TM.shape[1]
    flat = destinations_TM.flatten()
    # Half the digits of int32, a quarter of those of int64: torch sorts long lists of integers digit by digit.
    order = torch.argsort(flat.to(torch.int16) if num_destinations < 2**15 else flat, stable=True)
    choices_N = order[:num_rows]
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    present_TM = destinations_TM < num_destinations
    counts_T = present_TM.sum(dim=1)
    if num_rows < flat.numel():
        slots = _compressed(slots, present_TM.flatten(), num_rows)
    return RowMap(choices_N, choices_N // num_choices, slots, torch.cumsum(counts_T, dim=0) - counts_T)


def _compressed(values: Tensor, present: Tensor, num_present: int) -> Tensor:
    """Return the values that are present, in their order; a mask as an index would wait for the device."""
    places = torch.where(present, torch.cumsum(present, dim=0) - 1, num_present)
    return values.new_empty(num_present + 1).scatter_(0, places, values)[:num_present]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return x_TD.index_select(0, row_map.tokens_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return add_up(grad_ND, ctx.row_map), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, row_map: RowMap) -> Tensor:
        ctx.row_map = row_map
        return add_up(y_ND, row_map)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.row_map.tokens_N), None


def add_up(y_ND: Tensor, row_map: RowMap) -> Tensor:
    """Do what `sum_rows` does, without a gradient."""
    if y_ND.shape[0] == 0:
        return y_ND.new_zeros(row_map.num_tokens, y_ND.shape[1])
    return F.embedding_bag(row_map.slots_N, y_ND.contiguous(), row_map.starts_T, mode="sum")


def gather_rows(x_TD: Tensor, row_map: RowMap) -> Tensor:
    """Copy each token to its rows: [T, D] -> [N, D]. Differentiable; its gradient is `sum_rows`."""
    out: Tensor = _Gather.apply(x_TD, row_map)  # type: ignore[no-untyped-call]
    return out


def sum_rows(y_ND: Tensor, row_map: RowMap) -> Tensor:
    """Add up the rows of each token, in order of its choices: [N, D] -> [T, D]. Its gradient is `gather_rows`."""
    out: Tensor = _Sum.apply(y_ND, row_map)  # type: ignore[no-untyped-call]
    return out


def sum_rows_reference(y_ND: Tensor, row_map: RowMap) -> Tensor:
    """Do what `sum_rows` does, row by row."""
    out_TD = y_ND.new_zeros(row_map.num_tokens, y_ND.shape[1])
    for row, token in enumerate(row_map.tokens_N.tolist()):
        out_TD[token] = out_TD[token] + y_ND[row]
    return out_TD
