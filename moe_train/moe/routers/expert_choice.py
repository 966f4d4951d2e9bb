"""Expert choice: experts take tokens (Zhou et al. 2022, arXiv 2202.09368)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.moe.context import RoutingContext
from moe_train.moe.routers.linear import LinearRouter
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide


class ExpertChoiceRouter(LinearRouter):
    """softmax over experts, then each expert takes its best k = n·K/E of a sequence's n valid tokens (section 3.2).

    Load is even by construction; a token gets 0 to E experts, K on average, with its scores as weights. Whether a token
    is taken depends on later ones: a causal model that is trained so sees the future.
    """

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype; every expert has a column, of which only the chosen entries count."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        scores_TE = logits_TE.softmax(dim=1)
        ranking_TE = self.offered(scores_TE, context).masked_fill(~context.valid_T.unsqueeze(1), float("-inf"))
        experts_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(ranking_TE)

        def weigh(experts_TK: Tensor) -> Tensor:
            return self.scale * scores_TE.gather(1, experts_TK)

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=scores_TE,
            ranking_TE=ranking_TE,
            experts_TK=experts_TE,
            weights_TK=weigh(experts_TE),
            weigh=weigh,
            chosen_TK=decide(lambda: self.taken(ranking_TE, context)),
        )

    def taken(self, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return [T, E] bool: which tokens each expert takes, among equals the earliest."""
        ranking_BSE = ranking_TE.view(-1, context.length, self.num_experts)
        lengths_B = context.valid_T.view(-1, context.length).sum(dim=1)
        limits_B = (lengths_B * self.top_k // self.num_experts).clamp(min=1)
        # As fp32 numbers: in fp64 the last digits of equal tokens depend on the layout, and would decide.
        order_BSE = ranking_BSE.to(torch.float32).argsort(dim=1, descending=True, stable=True)
        places_BSE = order_BSE.argsort(dim=1)
        taken_BSE = (places_BSE < limits_B.view(-1, 1, 1)) & ranking_BSE.isfinite()
        return taken_BSE.view_as(ranking_TE)
