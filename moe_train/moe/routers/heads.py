"""A router for each head of attention, all of them at once (SwitchHead, arXiv 2312.07987, eq. 7 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.routing import SigmoidRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.roles import Role
from moe_train.moe.routers.linear import LinearRouter
from moe_train.moe.routers.scored import shares
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k


class HeadRouter(LinearRouter):
    """In each head the best experts by sigmoid, whose scores are the weights: heads compete for nothing.

    Expert e of head h has the index h · (experts of a head) + e, and the choices of a token stand in order of heads.

    Args:
        dim: width D of a token.
        heads: number H of heads.
        experts: of each head; E is H times as many.
        top_k: choices in each head; K is H times as many.
        config: scale, and expert dropout.
        role: of the weight.
    """

    def __init__(self, dim: int, heads: int, experts: int, top_k: int, config: SigmoidRouterConfig, role: Role) -> None:
        super().__init__(dim, heads * experts, heads * top_k, config, role)
        self.heads = heads

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        scores_TE = logits_TE.sigmoid()
        ranking_TE = self.offered(logits_TE, context)  # the order of the scores, without the ties of their rounding
        experts_TK = decide(lambda: self.choose(ranking_TE))

        def weigh(experts_TK: Tensor) -> Tensor:
            return self.scale * scores_TE.gather(1, experts_TK)

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=shares(self.by_head(scores_TE)).view_as(scores_TE) / self.heads,
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
        )

    def choose(self, ranking_TE: Tensor) -> Tensor:
        """Return the best experts of each head, one head after the other: [T, K]."""
        num_tokens, size = len(ranking_TE), self.num_experts // self.heads
        members = top_k(self.by_head(ranking_TE), self.top_k // self.heads).view(num_tokens, self.heads, -1)
        firsts_H1 = torch.arange(0, self.num_experts, size, device=members.device).unsqueeze(1)
        return (members + firsts_H1).flatten(1)

    def by_head(self, values_TE: Tensor) -> Tensor:
        """Return [T · H, E / H]: a row for each head."""
        return values_TE.reshape(len(values_TE) * self.heads, self.num_experts // self.heads)
