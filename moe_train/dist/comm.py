"""The collectives of the forward pass: the only ones, differentiable, counted and timed.

`all_to_all_rows` is a custom operator, not a plain autograd function, so that selective activation checkpointing can
keep its result instead of sending the tokens again (an in-place c10d call cannot be saved).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]


@dataclass
class Meter:
    """What the exchange of this process has cost since the last reset.

    Attributes:
        sent_bytes: bytes given to other ranks and to itself.
        calls: number of exchanges.
        seconds: time on the CPU backend, waiting for slower ranks included.
        events: pairs of device events around the exchanges, on an accelerator; read when the record is written.
    """

    sent_bytes: int = 0
    calls: int = 0
    seconds: float = 0.0
    events: list[tuple[torch.Event, torch.Event]] = field(default_factory=list)

    def take_ms(self) -> float:
        """Return the milliseconds since the last call and start again. Waits for the device."""
        for start, end in self.events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000.0
        total_ms = self.seconds * 1000.0
        self.seconds, self.sent_bytes, self.calls = 0.0, 0, 0
        self.events.clear()
        return total_ms


METER = Meter()
"""Per process, because the backward pass of the operator has no other place to report to."""


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
    group = _resolve_process_group(GroupName(group_name))
    out = x_ND.new_empty((sum(received), *x_ND.shape[1:]))
    METER.sent_bytes += x_ND.numel() * x_ND.element_size()
    METER.calls += 1
    if x_ND.device.type == "cpu":
        start_s = time.perf_counter()
        dist.all_to_all_single(out, x_ND.contiguous(), received, sent, group=group)
        METER.seconds += time.perf_counter() - start_s
        return out
    start, end = (torch.Event(x_ND.device, enable_timing=True) for _ in range(2))
    start.record()
    dist.all_to_all_single(out, x_ND.contiguous(), received, sent, group=group)
    end.record()
    METER.events.append((start, end))
    return out


@all_to_all_rows.register_fake
def _(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Tensor:
    return x_ND.new_empty((sum(received), *x_ND.shape[1:]))


def _setup(ctx: Any, inputs: tuple[Tensor, list[int], list[int], str], output: Tensor) -> None:
    _, ctx.received, ctx.sent, ctx.group_name = inputs


def _backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all_rows(grad_RD, ctx.sent, ctx.received, ctx.group_name), None, None, None


all_to_all_rows.register_autograd(_backward, setup_context=_setup)


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
