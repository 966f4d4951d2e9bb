"""Tokens go straight to every rank that holds one of their experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_train.moe.capacity import Plan
from moe_train.moe.exchange.journey import Transit
from moe_train.moe.exchange.route import send_by
from moe_train.moe.exchange.sharded import ShardedExchange


@dataclass(frozen=True)
class AllToAllExchange(ShardedExchange):
    """A token goes once to each rank that holds one of its experts.

    With b bytes per value, w per weight and v other ranks visited, a token costs v · (D · b + K · (w + 4)) bytes out
    and v · D · b home; backwards the same without the 4 of each id. What it has for its own rank stays there.

    Forwards there are four collectives: counts, of 16 bytes for each rank; ids and weights in one buffer; rows; and the
    sums home. Backwards there are three: there are no counts, and the gradients of the weights travel alone.
    """

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each token once to every rank that holds one of its experts. Waits for the device once."""
        return send_by([self.group], self.num_experts, x_TD, plan, self.parts)
