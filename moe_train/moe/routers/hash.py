"""Hash layers: experts by token id (Roller et al. 2021, arXiv 2106.04426)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.config.routing import HashRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.random import derive_seed, uniform
from moe_train.ops.topk import top_k

TABLE_SEED = derive_seed(0)
"""One table for every layer, step and run: text must meet the same experts when the model is used later."""


class HashRouter(nn.Module):
    """Every token id has K fixed experts, drawn at random, with equal weights. Has no parameters.

    Args:
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: scale of the weights.
    """

    bias_E: Tensor | None = None

    def __init__(self, num_experts: int, top_k: int, config: HashRouterConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.scale = config.scale

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype by their ids; what is in them does not matter."""
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        ranking_TE = uniform(TABLE_SEED, context.ids_BS.reshape(-1, 1) * self.num_experts + experts_E)
        experts_TK = decide(lambda: top_k(ranking_TE, self.top_k))
        logits_TE = torch.zeros_like(ranking_TE, dtype=precise)

        def weigh(experts_TK: Tensor) -> Tensor:
            return logits_TE.new_full(experts_TK.shape, self.scale / self.top_k)

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=logits_TE.scatter(1, experts_TK, 1.0 / self.top_k),
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
        )
