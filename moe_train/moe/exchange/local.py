"""No exchange: all experts are here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import DenseExchange, LocalDenseExchange
from moe_train.moe.exchange.journey import Cargo, Journey, Transit
from moe_train.ops.keep import decide


@dataclass(frozen=True)
class LocalExchange:
    """All experts are here: both ways are the identity.

    Attributes:
        num_experts: experts E of a layer.
    """

    num_experts: int

    @property
    def experts(self) -> range:
        """Places of the experts that this rank holds: all."""
        return range(self.num_experts)

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts: they are there."""
        return LocalDenseExchange(self.num_experts)

    def for_experts(self, num_experts: int) -> LocalExchange:
        """Return the exchange of a layer with so many experts."""
        return LocalExchange(num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Take the tokens as they are. Waits for the device only when assignments were dropped."""
        if plan.all_kept:
            return Transit([Journey(Cargo(x_TD, plan.experts_TK, plan.weights_TK), plan.kept_TK.numel())])
        experts_TK = torch.where(plan.kept_TK, plan.experts_TK, self.num_experts)
        num_assignments = decide(lambda: int(plan.kept_TK.sum()))
        return Transit([Journey(Cargo(x_TD, experts_TK, plan.weights_TK), num_assignments)])
