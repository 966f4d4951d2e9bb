"""Journeys of one or more all-to-alls, each of which takes a token once to every group of ranks that it must visit.

Experts live in runs: of E experts each of P groups of ranks holds the E / P that follow those of the group before, and
each of the ranks, or groups, within it an equal run of those. So one rule makes every leg: what leaves with experts
counted over E arrives with experts counted over E / P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.comm import exchange_counts
from moe_train.dist.riders import riders_of
from moe_train.dist.underway import Underway
from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import held_by
from moe_train.moe.exchange.journey import Cargo, Journey, Transit, split
from moe_train.moe.exchange.visits import Counts, among, map_visits, visits
from moe_train.moe.queues import count
from moe_train.ops.keep import decide


class RowLeg:
    """An all-to-all of rows, one for each pair of a token and a group of ranks that it visits, and the same back.

    With each token travel all of its expert ids and, in the same buffer, its weights; whose experts they are the rank
    that gets them knows best.

    Args:
        cargo: what leaves, with experts counted over all ``num_experts``.
        visited_PT: [P, T] bool, which of the group's ranks each token goes to; None: as follows from its experts.
        num_experts: that can be reached.
        group: the P ranks that it goes to; behind each lives a run of num_experts / P experts.
        counts: rows, as all ranks know them.
    """

    def __init__(
        self,
        cargo: Cargo,
        visited_PT: Tensor | None = None,
        *,
        num_experts: int,
        group: dist.ProcessGroup,
        counts: Counts,
    ) -> None:
        self._held = held_by(group, num_experts)
        if visited_PT is None:
            visited_PT = visits(cargo.experts_RK, num_experts, group.size())
        self._map = map_visits(visited_PT, group, counts)
        self._labels = self._map.send(cargo.weights_RK, cargo.experts_RK)
        self._rows = self._map.send(cargo.rows_RD)

    def arrive(self) -> Cargo:
        """Wait for the rows: those of this rank, then those of the others in order of ranks."""
        weights_RK = self._labels.arrive()
        experts_RK = among(riders_of(self._labels.buffer, weights_RK.shape[1]), self._held)
        return Cargo(self._rows.arrive(), experts_RK, weights_RK)

    def start_back(self, sums_RD: Tensor) -> Underway:
        """Begin to send one sum per row back."""
        return self._map.bring_home(sums_RD)

    def end_back(self, parts_ND: Tensor) -> Tensor:
        """Return the sums of each token's parts: they were added up as they arrived."""
        return parts_ND


@dataclass(frozen=True)
class Itinerary:
    """What this rank has to know of a transit before it begins, for each part.

    Attributes:
        legs: rows of each leg.
        num_assignments: how many arrive here.
    """

    legs: list[Counts]
    num_assignments: int


def plan_route(
    experts: Sequence[Tensor], visited: Sequence[Tensor], num_experts: int, groups: Sequence[dist.ProcessGroup]
) -> list[Itinerary]:
    """Agree on how many rows each rank sends and gets on every leg, for all parts at once.

    A rank knows the ranks that its tokens will visit at the end, and so all that they add to the traffic of later legs.
    It tells those whom it sends to; these add up what they are told, and tell the next. Nobody waits for rows in order
    to count them, and the host waits once: for the last table.

    Args:
        experts: [T, K] int64 of each part, global expert of each choice, or ``num_experts`` for none.
        visited: [P, T] bool of each part, ranks of the first group that each token goes to.
        num_experts: experts E of a layer.
        groups: the group of each leg.
    """
    by_part = [own_tables(*part, num_experts, groups) for part in zip(experts, visited, strict=True)]
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


def own_tables(
    experts_TK: Tensor, visited_PT: Tensor, num_experts: int, groups: Sequence[dist.ProcessGroup]
) -> list[Tensor]:
    """Return this rank's rows [P1], [P1, P2], ... by rank of each leg, and its assignments by rank of the last."""
    shape = [groups[0].size()]
    tables = [visited_PT.sum(dim=1)]
    for group in groups[1:]:
        shape.append(group.size())
        num_ranks = math.prod(shape)
        tables.append(visits(experts_TK, num_experts, num_ranks).sum(dim=1).view(shape))
    return [*tables, count(experts_TK, num_experts).view(*shape, -1).sum(dim=-1)]


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
    experts = [
        part.experts_TK if part.all_kept else torch.where(part.kept_TK, part.experts_TK, num_experts)
        for _, part in parts
    ]
    visited = [visits(experts_TK, num_experts, groups[0].size()) for experts_TK in experts]
    itineraries = decide(lambda: plan_route(experts, visited, num_experts, groups))
    journeys = []
    for (part_TD, part), experts_TK, visited_PT, itinerary in zip(parts, experts, visited, itineraries, strict=True):
        first, *ahead = legs_of(itinerary, num_experts, groups)
        cargo = Cargo(part_TD, experts_TK, part.weights_TK)
        journeys.append(Journey(first(cargo, visited_PT), itinerary.num_assignments, ahead))
    return Transit(journeys)


def legs_of(itinerary: Itinerary, num_experts: int, groups: Sequence[dist.ProcessGroup]) -> Iterator[partial[RowLeg]]:
    """Yield what begins each leg; on each, fewer experts can be reached than on the last."""
    for group, counts in zip(groups, itinerary.legs, strict=True):
        yield partial(RowLeg, num_experts=num_experts, group=group, counts=counts)
        num_experts //= group.size()
