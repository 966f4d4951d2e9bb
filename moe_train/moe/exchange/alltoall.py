"""Tokens go straight to every rank that holds one of their experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import AllGatherExchange, DenseExchange, held_by
from moe_train.moe.exchange.journey import Transit
from moe_train.moe.exchange.route import send_by


@dataclass(frozen=True)
class AllToAllExchange:
    """Experts are sharded over the ranks of a group in runs of E / P.

    With b bytes per value, w per weight and v other ranks visited, a token costs v · (D · b + K · (w + 4)) bytes out
    and v · D · b home; backwards the same without the 4 of each id.

    Attributes:
        group: the EP group.
        num_experts: experts E of a layer, a multiple of the group's size P.
        parts: runs of tokens that travel one after the other.
    """

    group: dist.ProcessGroup
    num_experts: int
    parts: int = 1

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""
        return held_by(self.group, self.num_experts)

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts."""
        return AllGatherExchange(self.group, self.num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each token once to every rank that holds one of its experts. Waits for the device once."""
        return send_by([self.group], self.num_experts, x_TD, plan, self.parts)
