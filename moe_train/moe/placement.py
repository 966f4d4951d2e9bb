"""Where the experts of a layer live: which expert is at which place.

Experts have global indices, by which routers choose, losses and capacity count, figures are told and checkpoints are
written. A place is a slot of the EP group: place p is on rank p // L. Exchange and experts know places only, so that
moving experts changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_train.moe.capacity import Plan, Slots
from moe_train.moe.roles import give_experts

if TYPE_CHECKING:
    from moe_train.moe.layer import MoELayer


class Placement:
    """The places of a layer's experts, at first those of their indices.

    No module with a buffer: buffers belong to the model and its checkpoints, whose tensors know of no place.

    Args:
        num_experts: experts E of the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.experts = tuple(range(num_experts))
        """Expert at each place."""
        self.table: Tensor | None = None
        """int64, place of each expert, then one entry E for no expert; None: each is at the place of its index."""

    def set(self, experts: Sequence[int], device: torch.device) -> None:
        """Take over other places, for plans on this device.

        Args:
            experts: expert at each place, each of them once.
            device: of the plans.
        """
        num_experts = len(self.experts)
        assert sorted(experts) == list(range(num_experts)), f"{experts} are not the {num_experts} experts in some order"
        self.experts = tuple(experts)
        if self.experts == tuple(range(num_experts)):
            self.table = None
            return
        places = [self.experts.index(expert) for expert in range(num_experts)]
        self.table = torch.tensor([*places, num_experts], device=device)

    def __call__(self, plan: Plan) -> Plan:
        """Return the plan with places for experts. The same plan where these are equal; does not wait for the device.

        A run of places in a buffer of fixed size moves with its expert.
        """
        if self.table is None:
            return plan
        slots = plan.slots
        if slots is not None:
            # What is not kept has slot E · per_expert: the first of the entry E.
            runs_TK = self.table[slots.slots_TK // slots.per_expert]
            slots = Slots(runs_TK * slots.per_expert + slots.slots_TK % slots.per_expert, slots.per_expert)
        return replace(plan, experts_TK=self.table[plan.experts_TK], slots=slots)


def set_placement(layer: MoELayer, experts: Sequence[int]) -> None:
    """Say which expert is at each place: to the plans of a layer, and to the roles of the parameters held here.

    Values do not move: each place must be given those of its expert before the next forward pass.

    Args:
        layer: on its device.
        experts: global index of the expert at each place, equal on all ranks.
    """
    layer.placement.set(experts, next(layer.experts.parameters()).device)
    give_experts(layer.experts, [experts[place] for place in layer.exchange.experts])
