"""Two levels: groups of experts, then experts inside (Shazeer et al. 2017, arXiv 1701.06538, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.routing import HierarchicalRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.routers.linear import LinearRouter, learned_role
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k


class HierarchicalRouter(LinearRouter):
    """The best groups, in each its best experts; a weight is the product of those of both levels (eq. 12).

    At each level the weights are a softmax over what was chosen. With as many groups as nodes, or ranks, a token
    travels to ``top_groups`` of them at most.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token over all its groups.
        config: groups of consecutive experts, and how many a token visits.
        init_std: standard deviation of initial weights.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, config: HierarchicalRouterConfig, init_std: float
    ) -> None:
        super().__init__(dim, num_experts, top_k, config, learned_role(init_std))
        self.groups = config.groups
        self.top_groups = config.top_groups
        self.group_weight = nn.Parameter(torch.empty(config.groups, dim))
        self.roles["group_weight"] = learned_role(init_std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""
        inputs_TD = self.precise_inputs(x_TD, context)
        num_tokens, size = x_TD.shape[0], self.num_experts // self.groups
        group_logits = F.linear(inputs_TD, self.group_weight.to(inputs_TD.dtype))
        logits_TE = self.logits(inputs_TD)

        chosen_groups, experts_TK = decide(lambda: self.choose(group_logits, self.offered(logits_TE, context)))
        group_weights = group_logits.gather(1, chosen_groups).softmax(dim=1).unsqueeze(2)
        member_weights = logits_TE.gather(1, experts_TK).view(num_tokens, self.top_groups, -1).softmax(dim=2)
        member_probabilities = logits_TE.view(num_tokens, self.groups, size).softmax(dim=2)
        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=(group_logits.softmax(dim=1).unsqueeze(2) * member_probabilities).flatten(1),
            ranking_TE=logits_TE.detach(),
            experts_TK=experts_TK,
            weights_TK=self.scale * (group_weights * member_weights).flatten(1),
            weigh=no_other_weights,
        )

    def choose(self, group_logits: Tensor, ranking_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's best groups [T, top_groups] and the best experts in these, in their order: [T, K]."""
        num_tokens, size = ranking_TE.shape[0], self.num_experts // self.groups
        chosen_groups = top_k(group_logits, self.top_groups)
        inside = chosen_groups.unsqueeze(2).expand(-1, -1, size)  # [T, top_groups, size]
        offered = ranking_TE.view(num_tokens, self.groups, size).gather(1, inside)
        members = top_k(offered.flatten(0, 1), self.top_k // self.top_groups).view(num_tokens, self.top_groups, -1)
        return chosen_groups, (chosen_groups.unsqueeze(2) * size + members).flatten(1)


def no_other_weights(experts_TK: Tensor) -> Tensor:
    """Refuse to weigh experts other than the chosen: a weight belongs to its group's choice."""
    raise AssertionError("hierarchical weights exist for the chosen experts only; the configuration refuses rerouting")
