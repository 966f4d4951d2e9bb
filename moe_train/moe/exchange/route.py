"""Journeys of one or more all-to-alls, each of which takes a token once to every group of ranks that it must visit.

Experts live in runs: of E experts each of P groups of ranks holds the E / P that follow those of the group before, and
each of the ranks, or groups, within it an equal run of those. So one rule makes every leg: what leaves with experts
counted over E arrives with experts counted over E / P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.comm import exchange_counts
from moe_train.dist.underway import Underway, send_rows
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange.journey import Cargo, Journey, Transit, split
from moe_train.moe.queues import count
from moe_train.ops.keep import decide
from moe_train.ops.permute import RowMap, gather_rows, map_rows, sum_rows


@dataclass(frozen=True)
class Counts:
    """Rows of one leg.

    Attributes:
        sent: rows for each rank of its group.
        received: rows from each rank.
    """

    sent: list[int]
    received: list[int]


class RowLeg:
    """An all-to-all of rows, one for each pair of a token and a group of ranks that it visits, and the same back.

    Args:
        cargo: what leaves, with experts counted over all ``num_experts``.
        num_experts: that can be reached.
        group: the P ranks that it goes to; behind each lives a run of num_experts / P experts.
        counts: rows, as all ranks know them.
    """

    def __init__(self, cargo: Cargo, num_experts: int, group: dist.ProcessGroup, counts: Counts) -> None:
        self._group, self._counts = group, counts
        num_ranks = group.size()
        held = num_experts // num_ranks
        home_RK = cargo.experts_RK // held  # num_ranks where there is no expert
        ranks_P = torch.arange(num_ranks, device=home_RK.device)
        visited_RP = torch.where(visits(home_RK, num_ranks), ranks_P, num_ranks)
        self._row_map: RowMap = map_rows(visited_RP, num_ranks, sum(counts.sent))

        # Row n goes to rank p: of its token's choices, those that live there, counted from the first expert there.
        rank_N1 = (self._row_map.choices_N % num_ranks).unsqueeze(1)
        there_NK = home_RK.index_select(0, self._row_map.tokens_N) == rank_N1
        experts_NK = cargo.experts_RK.index_select(0, self._row_map.tokens_N) - rank_N1 * held
        self._experts = self._send(torch.where(there_NK, experts_NK, held).to(torch.int32))
        self._rows = self._send(gather_rows(cargo.rows_RD, self._row_map))
        self._weights = self._send(gather_rows(cargo.weights_RK, self._row_map))

    def _send(self, x_ND: Tensor) -> Underway:
        return send_rows(x_ND, self._counts.received, self._counts.sent, self._group.group_name)

    def arrive(self) -> Cargo:
        """Wait for the rows, in order of the ranks that they come from."""
        experts_RK = self._experts.arrive().to(torch.int64)
        return Cargo(self._rows.arrive(), experts_RK, self._weights.arrive())

    def start_back(self, sums_RD: Tensor) -> Underway:
        """Begin to send one sum per row back."""
        return send_rows(sums_RD, self._counts.sent, self._counts.received, self._group.group_name)

    def end_back(self, parts_ND: Tensor) -> Tensor:
        """Add up each token's parts, in order of ranks."""
        return sum_rows(parts_ND, self._row_map)


def visits(home_TK: Tensor, num_ranks: int) -> Tensor:
    """Return [T, P] bool: whether token t goes to rank p, from the rank of each choice (num_ranks for none)."""
    visited = torch.zeros(home_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=home_TK.device)
    return visited.scatter_(1, home_TK, True)[:, :num_ranks]


@dataclass(frozen=True)
class Itinerary:
    """What this rank has to know of a transit before it begins, for each part.

    Attributes:
        legs: rows of each leg.
        num_assignments: how many arrive here.
    """

    legs: list[Counts]
    num_assignments: int


def plan_route(experts: Sequence[Tensor], num_experts: int, groups: Sequence[dist.ProcessGroup]) -> list[Itinerary]:
    """Agree on how many rows each rank sends and gets on every leg, for all parts at once.

    A rank knows the ranks that its tokens will visit at the end, and so all that they add to the traffic of later legs.
    It tells those whom it sends to; these add up what they are told, and tell the next. Nobody waits for rows in order
    to count them, and the host waits once: for the last table.

    Args:
        experts: [T, K] int64 of each part, global expert of each choice, or ``num_experts`` for none.
        num_experts: experts E of a layer.
        groups: the group of each leg.
    """
    by_part = [own_tables(experts_TK, num_experts, groups) for experts_TK in experts]
    tables = [torch.stack(of_parts) for of_parts in zip(*by_part, strict=True)]
    told, parts = [], len(experts)
    for group in groups:
        # By part and rank of this leg: its rows, then the rows of later legs and assignments by rank of those.
        outgoing_PM = torch.cat([table.transpose(0, 1).flatten(1) for table in tables], dim=1)
        incoming_PM = exchange_counts(outgoing_PM, group)
        told += [outgoing_PM[:, :parts], incoming_PM[:, :parts]]
        sizes = [table[:, 0].numel() for table in tables]
        sums = [t.sum(dim=0) for t in torch.split(incoming_PM, sizes, dim=1)]
        tables = [s.view(parts, *table.shape[2:]) for s, table in zip(sums, tables, strict=True)][1:]
    numbers = torch.cat([t.transpose(0, 1).flatten() for t in (*told, tables[0].unsqueeze(0))]).tolist()
    return read_itineraries(numbers, [group.size() for group in groups], parts)


def own_tables(experts_TK: Tensor, num_experts: int, groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """Return this rank's rows [P1], [P1, P2], ... by rank of each leg, and its assignments by rank of the last."""
    tables, shape, num_ranks = [], [], 1
    for group in groups:
        shape.append(group.size())
        num_ranks *= group.size()
        home_TK = experts_TK // (num_experts // num_ranks)
        tables.append(visits(home_TK, num_ranks).sum(dim=0).view(shape))
    return [*tables, count(home_TK, num_ranks).view(shape)]


def read_itineraries(numbers: list[int], group_sizes: Sequence[int], num_parts: int) -> list[Itinerary]:
    """Return what the last table says: for each leg rows sent and received by part and rank, then assignments."""
    legs: list[list[Counts]] = [[] for _ in range(num_parts)]
    for size in group_sizes:
        both, numbers = numbers[: 2 * num_parts * size], numbers[2 * num_parts * size :]
        sent, received = both[: num_parts * size], both[num_parts * size :]
        for part, counts in enumerate(legs):
            own = slice(part * size, (part + 1) * size)
            counts.append(Counts(sent[own], received[own]))
    return [Itinerary(counts, assignments) for counts, assignments in zip(legs, numbers, strict=True)]


def send_by(groups: Sequence[dist.ProcessGroup], num_experts: int, x_TD: Tensor, plan: Plan, num_parts: int) -> Transit:
    """Send tokens by one all-to-all in each group. Waits for the device once, whatever the parts and legs.

    Args:
        groups: of the legs.
        num_experts: experts E of a layer.
        x_TD: [T, D] tokens.
        plan: where they go.
        num_parts: runs of tokens that travel one after the other.
    """
    parts = split(x_TD, plan, num_parts)
    experts = [torch.where(part.kept_TK, part.experts_TK, num_experts) for _, part in parts]
    itineraries = decide(lambda: plan_route(experts, num_experts, groups))
    journeys = []
    for (part_TD, part), experts_TK, itinerary in zip(parts, experts, itineraries, strict=True):
        first, *ahead = legs_of(itinerary, num_experts, groups)
        cargo = Cargo(part_TD, experts_TK, part.weights_TK)
        journeys.append(Journey(first(cargo), itinerary.num_assignments, ahead))
    return Transit(journeys)


def legs_of(
    itinerary: Itinerary, num_experts: int, groups: Sequence[dist.ProcessGroup]
) -> Iterator[Callable[[Cargo], RowLeg]]:
    """Yield what begins each leg; on each, fewer experts can be reached than on the last."""
    for group, counts in zip(groups, itinerary.legs, strict=True):
        yield partial(RowLeg, num_experts=num_experts, group=group, counts=counts)
        num_experts //= group.size()
