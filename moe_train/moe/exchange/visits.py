"""Tokens that leave for the ranks that they visit, and what comes back of each visit.

A visit is a pair of a token and a rank, and one row that travels. Rows for this rank itself come first, then those for
the others in order of ranks; what arrives lies in the same order of its sources. So what a rank has for itself never
passes through the network: it is copied to its place while the rest travels. Rows are gathered as they leave and added
up as they come home, in one operator each, which are each other's adjoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_train.dist.comm import group_named, row_bytes
from moe_train.dist.meter import METER
from moe_train.dist.riders import pack, values_of
from moe_train.dist.underway import Started, Underway, landed, landed_backward, setup, take_off, ticket_of


@dataclass(frozen=True)
class Counts:
    """Rows of one leg.

    Attributes:
        sent: rows for each rank of its group.
        received: rows from each rank.
    """

    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class VisitMap:
    """N visits of T tokens.

    Attributes:
        tokens_N: [N] int64, token of each row.
        slots_N: [N] int64, rows in order of tokens, those of one token in order of the list above: own rank first.
        starts_T: [T] int64, where the rows of each token begin in slots_N.
        counts: rows by rank.
        group_name: name of the group of ranks.
    """

    tokens_N: Tensor
    slots_N: Tensor
    starts_T: Tensor
    counts: Counts
    group_name: str

    def send(self, x_TM: Tensor, riders_TK: Tensor | None = None) -> Underway:
        """Begin to send each token's row along on its visits: [T, M] to [R, M].

        Args:
            x_TM: [T, M] rows, one per token.
            riders_TK: [T, K] integers to travel beside them, to be found in the buffer (`riders_of`); then values have
                four or eight bytes.
        """
        buffer, ticket = self._start(x_TM, riders_TK)
        finish = None if riders_TK is None else partial(values_of, num_riders=riders_TK.shape[1], dtype=x_TM.dtype)
        return Underway(buffer, ticket, self._start_back, finish)

    def bring_home(self, sums_RD: Tensor) -> Underway:
        """Begin to send one row per visit back, where those of a token are added up: [R, D] to [T, D]."""
        buffer, ticket = self._start_back(sums_RD)
        finish = partial(sum_visits, slots_N=self.slots_N, starts_T=self.starts_T)
        return Underway(buffer, ticket, self._start, finish)

    def _start(self, x_TM: Tensor, riders_TK: Tensor | None = None) -> Started:
        lists = self.counts.received, self.counts.sent, self.group_name
        started: Started = start_visits(x_TM, riders_TK, self.tokens_N, self.slots_N, self.starts_T, *lists)
        return started

    def _start_back(self, y_RM: Tensor) -> Started:
        started: Started = start_return(y_RM, self.counts.sent, self.counts.received, self.group_name)
        return started


def visits(experts_TK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return [P, T] bool: whether rank p, with the p-th run of experts, is visited by token t.

    Args:
        experts_TK: [T, K] int64, expert of each choice, or ``num_experts`` for none.
        num_experts: shared evenly between the ranks.
        num_ranks: number P of ranks.
    """
    home_TK = experts_TK // (num_experts // num_ranks)  # num_ranks where there is no expert
    visited = torch.zeros(num_ranks + 1, len(home_TK), dtype=torch.bool, device=home_TK.device)
    return visited.scatter_(0, home_TK.t(), True)[:num_ranks]


def among(experts_RK: Tensor, held: range) -> Tensor:
    """Return the index [R, K] of each expert among those held here, or their number where it is none of them.

    Args:
        experts_RK: [R, K] int64, over all that could be reached.
        held: the run of those that are here.
    """
    local_RK = experts_RK - held.start
    return local_RK.masked_fill_(local_RK < 0, len(held)).clamp_(max=len(held))


def map_visits(visited_PT: Tensor, group: dist.ProcessGroup, counts: Counts) -> VisitMap:
    """Number the visits by sums over the table, without sorting it and without waiting for the device.

    Args:
        visited_PT: [P, T] bool, by rank of the group and token.
        group: the ranks.
        counts: rows by rank, as the host knows them.
    """
    own, num_tokens, num_rows = group.rank(), visited_PT.shape[1], sum(counts.sent)
    own_first_PT = torch.cat([visited_PT[own : own + 1], visited_PT[:own], visited_PT[own + 1 :]])
    rows_PT = running(own_first_PT, num_rows)
    tokens_PT = torch.arange(num_tokens, device=visited_PT.device).expand_as(rows_PT)
    by_token_TP = running(own_first_PT.t().contiguous(), num_rows)
    before_T = own_first_PT.sum(dim=0)
    return VisitMap(
        tokens_N=placed(tokens_PT, rows_PT, num_rows),
        slots_N=placed(rows_PT.t(), by_token_TP, num_rows),
        starts_T=torch.cumsum(before_T, dim=0) - before_T,
        counts=counts,
        group_name=group.group_name,
    )


def running(present: Tensor, num: int) -> Tensor:
    """Return the number of each present entry in order of the flattened table, ``num`` for the others; its shape."""
    numbers = torch.cumsum(present.flatten(), dim=0).sub_(1).view_as(present)
    return numbers.masked_fill_(~present, num)


def placed(values: Tensor, places: Tensor, num: int) -> Tensor:
    """Return [num], the values of a table at their places; those with the place ``num`` are left out."""
    out = torch.empty(num + 1, dtype=values.dtype, device=values.device)
    return out.scatter_(0, places.flatten(), values.flatten())[:num]


def sum_visits(rows_ND: Tensor, slots_N: Tensor, starts_T: Tensor) -> Tensor:
    """Add up the rows of each token, in order of `VisitMap`: [N, D] to [T, D]."""
    if len(rows_ND) == 0:
        return rows_ND.new_zeros(len(starts_T), rows_ND.shape[1])
    return F.embedding_bag(slots_N, rows_ND.detach(), starts_T, mode="sum")


def trade(
    into_RM: Tensor,
    others: Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup,
    ticket: Tensor,
) -> Started:
    """Start an all-to-all of all but the first rows, those that this rank has for itself; the caller copies these.

    Args:
        into_RM: [R, M] where rows will be, own ones first.
        others: [N - own, M] rows for other ranks.
        received: rows from each rank, own ones included.
        sent: rows for each rank, own ones included.
        group: the ranks.
        ticket: of this collective.
    """
    own = group.rank()
    METER.count(group, [rows * row_bytes(into_RM) for rows in sent])
    received, sent = ([0 if rank == own else rows for rank, rows in enumerate(both)] for both in (received, sent))
    arriving = into_RM[len(into_RM) - sum(received) :]
    start = partial(dist.all_to_all_single, arriving, others, received, sent, group=group, async_op=True)
    return take_off(start, others, into_RM, ticket)


@torch.library.custom_op("moe_train::start_visits", mutates_args=())
def start_visits(
    x_TM: Tensor,
    riders_TK: Tensor | None,
    tokens_N: Tensor,
    slots_N: Tensor,
    starts_T: Tensor,
    received: list[int],
    sent: list[int],
    group_name: str,
) -> Started:
    """Gather the rows of all visits and start to send them; return buffer [R, M] and ticket.

    The gradient of a token is the sum of what comes back of its visits, over ``slots_N`` and ``starts_T``.
    """
    group = group_named(group_name)
    num_own, packed_TM = sent[group.rank()], pack(x_TM, riders_TK)
    into_RM = packed_TM.new_empty(sum(received), packed_TM.shape[1])
    others = packed_TM.index_select(0, tokens_N[num_own:])
    started = trade(into_RM, others, received, sent, group, ticket_of(x_TM))
    torch.index_select(packed_TM, 0, tokens_N[:num_own], out=into_RM[:num_own])
    return started


@start_visits.register_fake
def _(x_TM: Tensor, riders_TK: Tensor | None, *args: Any) -> Started:
    packed_TM = pack(x_TM, riders_TK)
    return packed_TM.new_empty(sum(args[3]), packed_TM.shape[1]), ticket_of(x_TM)


@torch.library.custom_op("moe_train::start_return", mutates_args=())
def start_return(y_RD: Tensor, received: list[int], sent: list[int], group_name: str) -> Started:
    """Start to send what was made of each row back to where it came from; return buffer [N, D] and ticket."""
    group, y_RD = group_named(group_name), y_RD.contiguous()
    num_own, into_ND = sent[group.rank()], y_RD.new_empty(sum(received), y_RD.shape[1])
    started = trade(into_ND, y_RD[num_own:], received, sent, group, ticket_of(y_RD))
    into_ND[:num_own].copy_(y_RD[:num_own])
    return started


@start_return.register_fake
def _(y_RD: Tensor, received: list[int], sent: list[int], group_name: str) -> Started:
    return y_RD.new_empty(sum(received), y_RD.shape[1]), ticket_of(y_RD)


def _setup_visits(ctx: Any, inputs: tuple[Any, ...], output: Started) -> None:
    setup(ctx, inputs, output)
    _, _, _, slots_N, starts_T, *_ = inputs
    ctx.save_for_backward(slots_N, starts_T)


def _sum_of_visits(ctx: Any, grad_buffer: None, ticket: Tensor) -> tuple[Tensor | None, ...]:
    slots_N, starts_T = ctx.saved_tensors
    return sum_visits(landed(grad_buffer, ticket), slots_N, starts_T), *(None for _ in range(ctx.num_others))


start_visits.register_autograd(_sum_of_visits, setup_context=_setup_visits)
start_return.register_autograd(landed_backward, setup_context=setup)
