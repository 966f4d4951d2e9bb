"""The Mixture-of-Experts layer: the seam where routing, capacity, exchange and experts meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import Exchange
from moe_train.moe.experts import Experts
from moe_train.moe.head_experts import HeadExperts
from moe_train.moe.mlp_experts import MLPExperts
from moe_train.moe.placement import Placement
from moe_train.moe.record import LayerOutput
from moe_train.moe.routers import Router


class MoELayer(nn.Module):
    """Routes tokens to experts, wherever these live. `forward` changes nothing: recomputation cannot count twice.

    Args:
        router: chooses experts.
        capacity: limits what they take.
        exchange: brings tokens to them; with the number of experts held, all that expert parallelism changes.
        experts: those held on this rank.
        balance: losses over what the router did; formed by the step, kept here because they belong to the layer.
        shared: a network that every token visits, or None (DeepSeekMoE, arXiv 2401.06066, eq. 9).
    """

    def __init__(
        self,
        router: Router,
        capacity: Capacity,
        exchange: Exchange,
        experts: Experts | HeadExperts | MLPExperts,
        balance: Balance,
        shared: nn.Module | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.capacity = capacity
        self.exchange = exchange
        self.experts = experts
        self.balance = balance
        self.shared = shared
        self.placement = Placement(capacity.num_experts)

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, routed_by_BSD: Tensor | None = None
    ) -> LayerOutput:
        """Apply the layer.

        Args:
            x_BSD: [B, S, D] what the experts see of the tokens.
            context: what else is known of them; None: a batch of its own, all valid, their places as ids.
            routed_by_BSD: [B, S, C] what the router sees of them; None: the same.
        """
        if context is None:
            context = RoutingContext.of(torch.arange(x_BSD[..., 0].numel(), device=x_BSD.device).view(x_BSD.shape[:2]))
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD if routed_by_BSD is None else routed_by_BSD.flatten(0, 1), context)
        plan = self.placement(self.capacity.plan(routing, context, self.training))
        transit = self.exchange.dispatch(x_TD, plan)  # the tokens leave, together or in parts
        shared_BSD = None if self.shared is None else self.shared(x_BSD)  # works while they travel
        for arrived in transit:
            transit.send_home(self.experts(arrived), arrived)
        y_BSD = transit.home().view(*x_BSD.shape[:2], -1)  # of the width that the experts give it
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD
        return LayerOutput(y_BSD, RoutingRecord.of(routing, plan, context, self.balance))

    def figures(self) -> dict[str, object]:
        """Return ``bias_range``: largest minus least bias of loss-free balancing, where there is one."""
        bias_E = self.router.bias_E
        return {} if bias_E is None else {"bias_range": (bias_E.max() - bias_E.min()).item()}
