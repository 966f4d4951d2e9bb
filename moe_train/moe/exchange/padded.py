"""Buffers of fixed size, in which every expert has a run of places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.underway import Underway, send_rows
from moe_train.moe.capacity import Plan, Slots
from moe_train.moe.dense_exchange import DenseExchange
from moe_train.moe.exchange.journey import Cargo, Exchange, Journey, Transit
from moe_train.ops.slots import SlotMap, fill_slots, map_slots, sum_slots


@dataclass(frozen=True)
class PaddedLeg:
    """Equal parts of a buffer to all ranks, and back.

    Attributes:
        rows: [R, D] places of the experts here, from each rank a run for every expert, on their way.
        weights: [R, 1] of the tokens in them; zero where there is none.
        experts_R1: [R, 1] int64, the expert of each place.
        slot_map: places of this rank's tokens in the buffer that it sent.
        group: the EP group.
    """

    rows: Underway
    weights: Underway
    experts_R1: Tensor
    slot_map: SlotMap
    group: dist.ProcessGroup

    def arrive(self) -> Cargo:
        """Wait for the buffers."""
        return Cargo(self.rows.arrive(), self.experts_R1, self.weights.arrive())

    def start_back(self, sums_RD: Tensor) -> Underway:
        """Begin to send them back."""
        return send_evenly(sums_RD, self.group)

    def end_back(self, parts_ND: Tensor) -> Tensor:
        """Add up each token's places, in order of its choices."""
        return sum_slots(parts_ND, self.slot_map)


def send_evenly(rows_ND: Tensor, group: dist.ProcessGroup) -> Underway:
    """Begin to send equal parts [N / P, D] to all ranks, and to receive as much."""
    share = [len(rows_ND) // group.size()] * group.size()
    return send_rows(rows_ND, share, share, group.group_name)


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
        """Places of the experts that this rank holds; their global indices, unless experts have moved."""
        return self.unpadded.experts

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts: that is as many everywhere, with nothing to pad."""
        return self.unpadded.dense

    def for_experts(self, num_experts: int) -> Exchange:
        """Return the exchange of a layer with so many experts, which takes plans without slots."""
        return self.unpadded.for_experts(num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each expert's run of places [per_expert, D] to its rank. Does not wait for the device."""
        if plan.slots is None:
            return self.unpadded.dispatch(x_TD, plan)
        leg = self.leave(x_TD, plan.weights_TK, plan.slots)
        return Transit([Journey(leg, num_assignments=len(leg.experts_R1))])

    def leave(self, x_TD: Tensor, weights_TK: Tensor, slots: Slots) -> PaddedLeg:
        """Fill the buffers [E · per_expert, D] and begin to send them."""
        num_slots = self.num_experts * slots.per_expert
        slot_map, weight_map = (map_slots(table, num_slots) for table in (slots.slots_TK, slots.slots_TK.view(-1, 1)))
        # From each rank comes a run for every expert held here.
        places_R1 = torch.arange(num_slots, device=x_TD.device).unsqueeze(1)
        return PaddedLeg(
            rows=send_evenly(fill_slots(x_TD, slot_map), self.group),
            weights=send_evenly(fill_slots(weights_TK.reshape(-1, 1), weight_map), self.group),
            experts_R1=places_R1 // slots.per_expert % len(self.experts),
            slot_map=slot_map,
            group=self.group,
        )
