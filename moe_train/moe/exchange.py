"""How tokens reach their experts and come home: the only thing that expert parallelism changes in a layer.

A token travels once to each rank that holds one of its experts, with its expert ids and weights; the experts there add
up their part of its sum; one row per token and rank comes back and the parts are added at home. Or, in buffers of fixed
size, it travels once per expert: more rows, but nobody waits to learn how many come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.comm import all_to_all_rows, exchange_counts
from moe_train.dist.mesh import Mesh
from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import AllGatherExchange, DenseExchange, LocalDenseExchange, held_by
from moe_train.moe.queues import count
from moe_train.ops.permute import RowMap, gather_rows, map_rows, sum_rows
from moe_train.ops.slots import SlotMap, fill_slots, map_slots, sum_slots


@dataclass(frozen=True)
class Journey:
    """The way home of what arrived.

    Attributes:
        row_map: rows sent from here, made of this rank's tokens.
        sent: rows sent to each rank.
        received: rows received from each rank.
    """

    row_map: RowMap
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class Arrived:
    """Tokens at the place of their experts.

    Attributes:
        rows_RD: [R, D] tokens.
        experts_RK: [R, K] int64, index among this rank's L experts of each choice, or L where the choice is not kept or
            lives elsewhere.
        weights_RK: [R, K] weight of each choice, at least fp32; meaningless where the expert is L.
        num_assignments: number of entries of experts_RK below L.
        journey: the way home; for buffers of fixed size the places of this rank's tokens in them; None when the tokens
            never left.
    """

    rows_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor
    num_assignments: int
    journey: Journey | SlotMap | None


class Exchange(Protocol):
    """Brings tokens to experts and sums back."""

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts, which are held in the same places."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """Send this rank's tokens [T, D] to the ranks of their experts."""

    def combine(self, sums_RD: Tensor, arrived: Arrived) -> Tensor:
        """Send the sums [R, D] home and add up each token's: [T, D]."""


@dataclass(frozen=True)
class LocalExchange:
    """All experts are here: both journeys are the identity.

    Attributes:
        num_experts: experts E of a layer.
    """

    num_experts: int

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds: all."""
        return range(self.num_experts)

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts: they are there."""
        return LocalDenseExchange(self.num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """Return the tokens as they are. Waits for the device only when assignments were dropped."""
        experts_TK = torch.where(plan.kept_TK, plan.experts_TK, self.num_experts)
        num_assignments = plan.kept_TK.numel() if plan.all_kept else int(plan.kept_TK.sum())
        return Arrived(x_TD, experts_TK, plan.weights_TK, num_assignments, journey=None)

    def combine(self, sums_RD: Tensor, arrived: Arrived) -> Tensor:
        """Return the sums as they are."""
        return sums_RD


@dataclass(frozen=True)
class AllToAllExchange:
    """Experts are sharded over the ranks of a group in runs of E / P.

    Attributes:
        group: the EP group.
        num_experts: experts E of a layer, a multiple of the group's size P.
    """

    group: dist.ProcessGroup
    num_experts: int

    @property
    def held(self) -> int:
        """Number L of experts per rank."""
        return self.num_experts // self.group.size()

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""
        return held_by(self.group, self.num_experts)

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts."""
        return AllGatherExchange(self.group, self.num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """Send each token once to every rank that holds one of its experts. Waits for the device once."""
        num_ranks = self.group.size()
        home_TK = torch.where(plan.kept_TK, plan.experts_TK // self.held, num_ranks)
        visits_TP = visits(home_TK, num_ranks)
        sent, received, num_assignments = self.agree_on_counts(home_TK, visits_TP)
        ranks_P = torch.arange(num_ranks, device=x_TD.device)
        row_map = map_rows(torch.where(visits_TP, ranks_P, num_ranks), num_ranks, sum(sent))

        # Row n goes to rank p: of its token's choices, those that live there, counted from that rank's first expert.
        rank_N1 = (row_map.choices_N % num_ranks).unsqueeze(1)
        there_NK = home_TK.index_select(0, row_map.tokens_N) == rank_N1
        experts_NK = plan.experts_TK.index_select(0, row_map.tokens_N) - rank_N1 * self.held
        experts_NK = torch.where(there_NK, experts_NK, self.held)

        name = self.group.group_name
        journey = Journey(row_map, sent, received)
        return Arrived(
            rows_RD=all_to_all_rows(gather_rows(x_TD, row_map), received, sent, name),
            experts_RK=all_to_all_rows(experts_NK.to(torch.int32), received, sent, name).to(torch.int64),
            weights_RK=all_to_all_rows(gather_rows(plan.weights_TK, row_map), received, sent, name),
            num_assignments=num_assignments,
            journey=journey,
        )

    def agree_on_counts(self, home_TK: Tensor, visits_TP: Tensor) -> tuple[list[int], list[int], int]:
        """Tell every rank how many rows and assignments come; return rows sent, rows received, assignments here."""
        num_ranks = self.group.size()
        assigned_P = count(home_TK, num_ranks)
        outgoing_P2 = torch.stack([visits_TP.sum(dim=0), assigned_P], dim=1)
        incoming_P2 = exchange_counts(outgoing_P2, self.group)
        table = torch.stack([outgoing_P2[:, 0], incoming_P2[:, 0], incoming_P2[:, 1]]).tolist()
        return table[0], table[1], sum(table[2])

    def combine(self, sums_RD: Tensor, arrived: Arrived) -> Tensor:
        """Send the partial sums home and add up each token's, in order of ranks."""
        journey = arrived.journey
        assert isinstance(journey, Journey), "these tokens did not come by this exchange"
        parts_ND = all_to_all_rows(sums_RD, journey.sent, journey.received, self.group.group_name)
        return sum_rows(parts_ND, journey.row_map)


@dataclass(frozen=True)
class PaddedExchange:
    """Buffers of fixed size travel, a run of places for each expert, filled up with zeros: no counts, no waiting.

    Attributes:
        group: the EP group.
        num_experts: experts E of a layer, a multiple of the group's size P.
        unpadded: for plans without slots: those of an evaluation without limit.
    """

    group: dist.ProcessGroup
    num_experts: int
    unpadded: Exchange

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""
        return self.unpadded.experts

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts: that is as many everywhere, with nothing to pad."""
        return self.unpadded.dense

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """Send each expert's run of places [per_expert, D] to its rank. Does not wait for the device."""
        if plan.slots is None:
            return self.unpadded.dispatch(x_TD, plan)
        slots_TK, per_expert = plan.slots.slots_TK, plan.slots.per_expert
        slot_map = map_slots(slots_TK, self.num_experts * per_expert)
        weight_map = map_slots(slots_TK.view(-1, 1), self.num_experts * per_expert)
        rows_RD = self.travel(fill_slots(x_TD, slot_map))
        # From each rank comes a run for every expert held here.
        held_R1 = torch.arange(len(rows_RD), device=x_TD.device).unsqueeze(1) // per_expert % len(self.experts)
        weights_R1 = self.travel(fill_slots(plan.weights_TK.reshape(-1, 1), weight_map))
        return Arrived(rows_RD, held_R1, weights_R1, num_assignments=len(rows_RD), journey=slot_map)

    def travel(self, rows_ND: Tensor) -> Tensor:
        """Send equal parts [N / P, D] to all ranks, and receive as much."""
        num_ranks = self.group.size()
        share = [len(rows_ND) // num_ranks] * num_ranks
        arrived_ND: Tensor = all_to_all_rows(rows_ND, share, share, self.group.group_name)
        return arrived_ND

    def combine(self, sums_RD: Tensor, arrived: Arrived) -> Tensor:
        """Send the buffers home and add up each token's places, in order of its choices."""
        if not isinstance(arrived.journey, SlotMap):
            return self.unpadded.combine(sums_RD, arrived)
        return sum_slots(self.travel(sums_RD), arrived.journey)


def exchange_for(mesh: Mesh, num_experts: int, padded: bool) -> Exchange:
    """Return the exchange of a layout.

    Args:
        mesh: the layout.
        num_experts: experts E of a layer; 0 for a dense model.
        padded: whether capacity gives assignments places in buffers of fixed size (``capacity.pad``).
    """
    local = mesh.layout.ep == 1
    unpadded = LocalExchange(num_experts) if local else AllToAllExchange(mesh.ep, num_experts)
    return PaddedExchange(mesh.ep, num_experts, unpadded) if padded else unpadded


def visits(home_TK: Tensor, num_ranks: int) -> Tensor:
    """Return [T, P] bool: whether token t goes to rank p, from the rank of each choice (num_ranks for none)."""
    visited = torch.zeros(home_TK.shape[0], num_ranks + 1, dtype=torch.bool, device=home_TK.device)
    return visited.scatter_(1, home_TK, True)[:, :num_ranks]
