"""What all routers with weights share: logits in at least fp32, jitter, expert dropout, the bias on the choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.routing import LearnedRouterConfig
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.roles import Kind, Role


class LinearRouter(nn.Module):
    """Scores experts by one linear map of the token.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: scale, jitter and expert dropout.
        role: of the weight; says how it is initialised.
        biased: whether loss-free balancing moves a bias on the choice.
        logit_bias: whether a learned bias is added to the logits.
    """

    bias_E: Tensor | None
    logit_bias_E: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        config: LearnedRouterConfig,
        role: Role,
        biased: bool = False,
        logit_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.scale = config.scale
        self.jitter = config.jitter
        self.expert_dropout = config.expert_dropout
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_parameter("logit_bias_E", nn.Parameter(torch.empty(num_experts)) if logit_bias else None)
        self.roles = {"weight": role, "logit_bias_E": Role(Kind.ROUTER, 0.0)}
        # A buffer, not a parameter: no gradient, no decay; saved with the model, because the choice depends on it.
        self.register_buffer("bias_E", torch.zeros(num_experts) if biased else None)

    def precise_inputs(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the tokens in at least fp32 (bf16 logits diverged in the Switch paper), jittered in training.

        The product is a new tensor: the experts' copy stays as it is.
        """
        precise_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if not (self.training and self.jitter):
            return precise_TD
        draws_TD = context.uniform(Purpose.JITTER, x_TD.shape[1]).to(precise_TD.dtype)
        return precise_TD * (1.0 - self.jitter + 2.0 * self.jitter * draws_TD)

    def logits(self, inputs_TD: Tensor) -> Tensor:
        """Return the scores [T, E] of inputs made by `precise_inputs`, in their dtype."""
        bias_E = None if self.logit_bias_E is None else self.logit_bias_E.to(inputs_TD.dtype)
        return F.linear(inputs_TD, self.weight.to(inputs_TD.dtype), bias_E)

    def offered(self, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return the ranking [T, E] without gradient, with -inf for experts that dropout takes from a token."""
        ranking_TE = ranking_TE.detach()
        if not (self.training and self.expert_dropout):
            return ranking_TE
        dropped_TE = context.uniform(Purpose.EXPERT_DROPOUT, self.num_experts) < self.expert_dropout
        return ranking_TE.masked_fill(dropped_TE, float("-inf"))


def learned_role(init_std: float) -> Role:
    """Return the role of a router's weight with normal initial values."""
    return Role(Kind.ROUTER, init_std)
