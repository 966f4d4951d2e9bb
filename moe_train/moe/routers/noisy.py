"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.routing import NoisyTopKRouterConfig
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.routers.linear import LinearRouter, learned_role
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k


class NoisyTopKRouter(LinearRouter):
    """H = x·Wg + eps · softplus(x·Wnoise), the K largest, a softmax over these (eq. 3 to 5).

    Both weights start at zero, so that the first choices are pure noise and all experts start with equal load. Without
    noise (evaluation) H = x·Wg.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: scale, jitter and expert dropout.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: NoisyTopKRouterConfig) -> None:
        super().__init__(dim, num_experts, top_k, config, learned_role(0.0))
        self.noise = nn.Parameter(torch.empty(num_experts, dim))
        self.roles["noise"] = learned_role(0.0)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""
        inputs_TD = self.precise_inputs(x_TD, context)
        logits_TE = noisy_TE = self.logits(inputs_TD)
        spread_TE = F.softplus(F.linear(inputs_TD, self.noise.to(inputs_TD.dtype)))
        if self.training:
            draws_TE = context.uniform(Purpose.NOISE, self.num_experts).to(logits_TE.dtype)
            noisy_TE = logits_TE + torch.special.ndtri(draws_TE) * spread_TE
        ranking_TE = self.offered(noisy_TE, context)
        experts_TK = decide(lambda: top_k(ranking_TE, self.top_k))

        def weigh(experts_TK: Tensor) -> Tensor:
            return self.scale * noisy_TE.gather(1, experts_TK).softmax(dim=1)

        has_load = self.training and self.top_k < self.num_experts
        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=logits_TE.softmax(dim=1),
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
            load_TE=smooth_load(logits_TE, noisy_TE, spread_TE, ranking_TE, self.top_k) if has_load else None,
        )


LEAST_SPREAD = 1e-6
"""Of the noise in the smooth load, where softplus may vanish: a ratio of zeros has no gradient."""


def smooth_load(logits_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, ranking_TE: Tensor, num_chosen: int) -> Tensor:
    """Return P(x, e) [T, E]: the chance that expert e is among the K best if only its own noise is drawn again (eq. 9).

    Args:
        logits_TE: x·Wg.
        noisy_TE: H, with the noise as drawn.
        spread_TE: standard deviation of the noise.
        ranking_TE: what the choice was made by.
        num_chosen: K, less than E: the threshold of a chosen expert is the (K + 1)-th largest.
    """
    best_TM = decide(lambda: top_k(ranking_TE, num_chosen + 1))
    chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter_(1, best_TM[:, :num_chosen], True)
    last_in_T1 = noisy_TE.gather(1, best_TM[:, num_chosen - 1 : num_chosen])
    first_out_T1 = noisy_TE.gather(1, best_TM[:, num_chosen:])
    thresholds_TE = torch.where(chosen_TE, first_out_T1, last_in_T1)
    chance_TE: Tensor = torch.special.ndtr((logits_TE - thresholds_TE) / spread_TE.clamp(min=LEAST_SPREAD))
    return chance_TE
