"""What all exchanges between ranks share: which experts are here, and how all tokens reach all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch.distributed as dist

from moe_train.moe.dense_exchange import AllGatherExchange, DenseExchange, held_by


@dataclass(frozen=True)
class ShardedExchange:
    """Experts are sharded over the ranks of a group in runs of E / P.

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
        """Places of the experts that this rank holds; their global indices, unless experts have moved."""
        return held_by(self.group, self.num_experts)

    def for_experts(self, num_experts: int) -> Self:
        """Return the exchange of a layer with so many experts over the same ranks."""
        return replace(self, num_experts=num_experts)

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts: straight."""
        return AllGatherExchange(self.group, self.num_experts)
