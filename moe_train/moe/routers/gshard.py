"""GShard's top-2 gating (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.routing import GShardRouterConfig
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.routers.linear import LinearRouter, learned_role
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k

EPSILON = 1e-9
"""Added to the sum of two weights before the division, as in lingvo's published code."""


class GShardRouter(LinearRouter):
    """The best expert, and a second one that is the next best or drawn; the two weights normalised before any drop.

    The load-balance loss counts first choices only. The second choice may be given up with the probability that its
    weight falls short of a threshold.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        config: how the second expert is chosen.
        init_std: standard deviation of initial weights.
        biased: whether loss-free balancing moves a bias on the choice; a drawn second expert does not see it.
    """

    def __init__(self, dim: int, num_experts: int, config: GShardRouterConfig, init_std: float, biased: bool) -> None:
        super().__init__(dim, num_experts, 2, config, learned_role(init_std), biased)
        self.second = config.second
        self.dispatch_threshold = config.dispatch_threshold

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        probabilities_TE = logits_TE.softmax(dim=1)
        biased_TE = logits_TE if self.bias_E is None else probabilities_TE + self.bias_E.to(logits_TE.dtype)
        ranking_TE = self.offered(biased_TE, context)
        experts_TK = decide(lambda: self.choose(logits_TE, ranking_TE, context))

        def weigh(experts_TK: Tensor) -> Tensor:
            chosen_TK = probabilities_TE.gather(1, experts_TK)
            return self.scale * chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + EPSILON)

        weights_TK = weigh(experts_TK)
        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=probabilities_TE,
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weights_TK,
            weigh=weigh,
            declined_TK=decide(lambda: self.declined(weights_TK / self.scale, context)),
            counted_TM=experts_TK[:, :1] if self.bias_E is None else decide(lambda: top_k(logits_TE, 1)),
        )

    def choose(self, logits_TE: Tensor, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return the best expert of each token and its second one: [T, 2]."""
        experts_TK = top_k(ranking_TE, 2)
        if not (self.training and self.second == "sampled"):
            return experts_TK
        first_T1 = experts_TK[:, :1]
        # The largest of logits + Gumbel noise is a draw from their softmax (Gumbel-max).
        noise_TE = -(-context.uniform(Purpose.SECOND_EXPERT, self.num_experts).to(logits_TE.dtype).log()).log()
        noisy_TE = (logits_TE + noise_TE).masked_fill(ranking_TE.isneginf(), float("-inf"))
        # Put above all others, not below: when dropout leaves one expert, the second must be another still.
        return top_k(noisy_TE.scatter(1, first_T1, float("inf")), 2)

    def declined(self, weights_TK: Tensor, context: RoutingContext) -> Tensor | None:
        """Return the second choices that are given up: each stays with probability min(1, weight / threshold)."""
        if not self.training or self.dispatch_threshold is None:
            return None
        draws_T1 = context.uniform(Purpose.DISPATCH, 1).to(weights_TK.dtype)
        declined_T1 = draws_T1 * self.dispatch_threshold >= weights_TK[:, 1:]
        return torch.cat([torch.zeros_like(declined_T1), declined_T1], dim=1)
