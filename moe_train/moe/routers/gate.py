"""A router of two linear maps: the gate of small mixtures, which chooses by more than one direction per expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.routing import TopKSoftmaxRouterConfig
from moe_train.moe.roles import Kind, Role
from moe_train.moe.routers.scored import ScoreRouter, Scoring


class GateRouter(ScoreRouter):
    """logits = W₂ · relu(W₁ · x + b₁) + b₂; the K largest, then a softmax over these.

    Source: the notebook of NoorMajdoub/Mixture-of-experts_MoE, whose gate is 20 -> 64 -> 4.

    Args:
        dim: width D of a token.
        gate_dim: hidden width N.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: scale, jitter and expert dropout.
        role: of both weights.
        biased: whether loss-free balancing moves a bias on the choice.
    """

    def __init__(
        self,
        dim: int,
        gate_dim: int,
        num_experts: int,
        top_k: int,
        config: TopKSoftmaxRouterConfig,
        role: Role,
        biased: bool,
    ) -> None:
        scoring = Scoring(sigmoid=False, normalised=True, logit_bias=True)
        super().__init__(gate_dim, num_experts, top_k, config, role, biased, scoring)
        self.hidden_ND = nn.Parameter(torch.empty(gate_dim, dim))
        self.hidden_bias_N = nn.Parameter(torch.empty(gate_dim))
        self.roles |= {"hidden_ND": role, "hidden_bias_N": Role(Kind.ROUTER, 0.0)}

    def logits(self, inputs_TD: Tensor) -> Tensor:
        """Return the scores [T, E] of inputs made by `precise_inputs`, in their dtype."""
        dtype = inputs_TD.dtype
        return super().logits(F.linear(inputs_TD, self.hidden_ND.to(dtype), self.hidden_bias_N.to(dtype)).relu())
