"""Tokens go once to every node that holds one of their experts, and on from there inside the node.

Rank i of a node sends a token to rank i of each node that it must visit (the first leg, along a rail), which passes it
on to the ranks of its node that hold the experts (the second). Sums take the same way back: what the ranks of a node
made of a token is added up by the rank that passed it on, so that one row per token and node goes home. This is the way
of DeepSeek-V3 (arXiv 2412.19437, section 3.2.2) and, over experts instead of tokens, of Tutel (arXiv 2206.03382).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moe_train.dist.nodes import NodeGroups
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange.journey import Transit
from moe_train.moe.exchange.route import send_by
from moe_train.moe.exchange.sharded import ShardedExchange


@dataclass(frozen=True)
class HierarchicalExchange(ShardedExchange):
    """A token goes once to each node that holds one of its experts, and on from there; the group fills several nodes.

    Between nodes a token costs, with m other nodes visited, what it costs `AllToAllExchange` with m ranks instead of
    those that it visits there; inside nodes more than there, at most once per node for each of its ranks.

    Attributes:
        groups: this rank's node and rail within the EP group.
    """

    groups: NodeGroups = field(kw_only=True)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each token once to every node that holds one of its experts. Waits for the device once."""
        return send_by([self.groups.rail, self.groups.node], self.num_experts, x_TD, plan, self.parts)
