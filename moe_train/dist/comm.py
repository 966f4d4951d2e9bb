"""The collectives of the forward pass: the only ones, differentiable, counted and timed.

They are custom operators, not plain autograd functions, so that selective activation checkpointing can keep their
results instead of sending the tokens again (an in-place c10d call cannot be saved). Those here wait for what they
sent; `moe_train.dist.underway` has the same that do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]

from moe_train.dist.meter import METER

__all__ = [
    "METER",
    "all_gather",
    "all_to_all_rows",
    "exchange_counts",
    "gather_rows_of_all",
    "group_named",
    "num_bytes",
    "reduce_scatter",
    "row_bytes",
    "sum_over",
    "sum_rows_of_all",
]

# Torch 2.13 renamed both and warns of the old names; older versions know no others.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@torch.library.custom_op("moe_train::all_to_all_rows", mutates_args=())
def all_to_all_rows(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Tensor:
    """Send ``sent[p]`` consecutive rows to each rank p of the group and return what they sent here, by source rank.

    Args:
        x_ND: [sum(sent), ...] rows in order of destination; any dtype.
        received: rows that come from each rank; zeros allowed.
        sent: rows for each rank; zeros allowed.
        group_name: name of the process group.

    Returns:
        [sum(received), ...] rows in order of source rank. The gradient travels the same way back (the exchange of the
        gradient with the two lists swapped: the adjoint of a permutation is its inverse).
    """
    group = group_named(group_name)
    out = x_ND.new_empty((sum(received), *x_ND.shape[1:]))
    METER.count(group, [rows * row_bytes(x_ND) for rows in sent])
    with METER.timed(x_ND.device):
        dist.all_to_all_single(out, x_ND.contiguous(), received, sent, group=group)
    return out


@all_to_all_rows.register_fake
def _(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Tensor:
    return x_ND.new_empty((sum(received), *x_ND.shape[1:]))


def _setup(ctx: Any, inputs: tuple[Tensor, list[int], list[int], str], output: Tensor) -> None:
    _, ctx.received, ctx.sent, ctx.group_name = inputs


def _backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all_rows(grad_RD, ctx.sent, ctx.received, ctx.group_name), None, None, None


all_to_all_rows.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("moe_train::gather_rows_of_all", mutates_args=())
def gather_rows_of_all(x_ND: Tensor, num_ranks: int, group_name: str) -> Tensor:
    """Give every rank of the group the rows of all: an all-gather.

    Args:
        x_ND: [N, ...] rows; as many on every rank.
        num_ranks: ranks P of the group.
        group_name: name of the process group.

    Returns:
        [P · N, ...] rows in order of source rank. The gradient of a row is the sum over the ranks that got it: the
        adjoint of an all-gather is a reduce-scatter.
    """
    group = group_named(group_name)
    out = x_ND.new_empty((num_ranks * len(x_ND), *x_ND.shape[1:]))
    METER.count(group, [num_bytes(x_ND)] * num_ranks)
    with METER.timed(x_ND.device):
        all_gather(out, x_ND.contiguous(), group=group)
    return out


@gather_rows_of_all.register_fake
def _(x_ND: Tensor, num_ranks: int, group_name: str) -> Tensor:
    return x_ND.new_empty((num_ranks * len(x_ND), *x_ND.shape[1:]))


@torch.library.custom_op("moe_train::sum_rows_of_all", mutates_args=())
def sum_rows_of_all(x_ND: Tensor, num_ranks: int, group_name: str) -> Tensor:
    """Add up the ranks' rows and keep this rank's part of the sum: a reduce-scatter.

    Args:
        x_ND: [P · N, ...] rows, those of rank p's tokens at place p; as many on every rank.
        num_ranks: ranks P of the group.
        group_name: name of the process group.

    Returns:
        [N, ...] sums, whose gradient goes to all ranks: an all-gather.
    """
    group = group_named(group_name)
    out = x_ND.new_empty((len(x_ND) // num_ranks, *x_ND.shape[1:]))
    METER.count(group, [num_bytes(out)] * num_ranks)
    with METER.timed(x_ND.device):
        reduce_scatter(out, x_ND.contiguous(), group=group)
    return out


@sum_rows_of_all.register_fake
def _(x_ND: Tensor, num_ranks: int, group_name: str) -> Tensor:
    return x_ND.new_empty((len(x_ND) // num_ranks, *x_ND.shape[1:]))


def _setup_of_all(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    _, ctx.num_ranks, ctx.group_name = inputs


def _sum_backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
    return gather_rows_of_all(grad_ND, ctx.num_ranks, ctx.group_name), None, None


def _gather_backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
    return sum_rows_of_all(grad_ND, ctx.num_ranks, ctx.group_name), None, None


gather_rows_of_all.register_autograd(_gather_backward, setup_context=_setup_of_all)
sum_rows_of_all.register_autograd(_sum_backward, setup_context=_setup_of_all)


def group_named(name: str) -> dist.ProcessGroup:
    """Return the process group of a name: operators take no groups."""
    group: dist.ProcessGroup = _resolve_process_group(GroupName(name))
    return group


def row_bytes(x_ND: Tensor) -> int:
    """Return the bytes of one row, also of none."""
    return x_ND.shape[1:].numel() * x_ND.element_size()


def num_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return x.numel() * x.element_size()


def exchange_counts(counts_PM: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send row p of an integer table to rank p and return the rows that came, by source rank: [P, M] -> [P, M]."""
    out_PM = torch.empty_like(counts_PM)
    dist.all_to_all_single(out_PM, counts_PM.contiguous(), group=group)
    return out_PM


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of ``x`` over the ranks of the group, as a new tensor. Not differentiable."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total
