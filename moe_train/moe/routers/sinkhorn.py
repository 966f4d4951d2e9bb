"""Choice after Sinkhorn's balancing over the whole batch (S-BASE: Clark et al. 2022, arXiv 2202.01169, appendix)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.routing import SinkhornRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.routers.linear import LinearRouter, learned_role
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k

EPSILON = 1e-8
"""Keeps the multipliers finite, as in Megatron's published iteration."""


class SinkhornRouter(LinearRouter):
    """In training the K largest of a plan in which tokens and experts have even shares, in evaluation of the logits.

    The plan is made over the tokens of all ranks, so that it is the same wherever these lie. Weights are those of the
    raw scores: sigmoid for K = 1, else a softmax over the chosen.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: when the iteration stops.
        init_std: standard deviation of initial weights.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: SinkhornRouterConfig, init_std: float) -> None:
        super().__init__(dim, num_experts, top_k, config, learned_role(init_std))
        self.tolerance = config.tolerance
        self.max_iterations = config.max_iterations

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype. In training one collective and one wait for the device per iteration."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        ranking_TE, experts_TK = decide(lambda: self.choose(logits_TE.detach(), context))

        def weigh(experts_TK: Tensor) -> Tensor:
            chosen_TK = logits_TE.gather(1, experts_TK)
            return self.scale * (chosen_TK.sigmoid() if self.top_k == 1 else chosen_TK.softmax(dim=1))

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=logits_TE.softmax(dim=1),
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
        )

    def choose(self, logits_TE: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return the ranking [T, E], which needs the other ranks and is made once with the choice, and that: [T, K]."""
        plan_TE = self.even_plan(logits_TE, context) if self.training else logits_TE
        ranking_TE = self.offered(plan_TE, context)
        return ranking_TE, top_k(ranking_TE, self.top_k)

    def even_plan(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return [T, E]: the costs exp(logits), scaled by rows and columns until all shares are even (Sinkhorn 1967).

        A row's largest logit is taken off first, which the row's multiplier undoes: no exponent overflows.
        """
        peaks_T1 = logits_TE.max(dim=1, keepdim=True).values
        costs_TE = (logits_TE - peaks_T1).exp() * context.valid_T.unsqueeze(1)
        num_valid = context.peers.sum(context.valid_T.sum()).clamp(min=1)
        columns_E = torch.ones_like(costs_TE[0])
        for _ in range(self.max_iterations):
            rows_T1 = 1.0 / (num_valid * ((costs_TE * columns_E).sum(dim=1, keepdim=True) + EPSILON))
            shares_E = context.peers.sum((costs_TE * rows_T1).sum(dim=0))
            before_E, columns_E = columns_E, 1.0 / (self.num_experts * (shares_E + EPSILON))
            if (columns_E - before_E).abs().mean() < self.tolerance:
                break
        return costs_TE * columns_E * rows_T1
