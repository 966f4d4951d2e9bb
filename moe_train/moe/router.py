"""How a token chooses its experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.schema import TopKRouterConfig
from moe_train.moe.roles import Kind, Role
from moe_train.ops.topk import top_k


@dataclass(frozen=True)
class Routing:
    """What a router decided, and what the balance losses need.

    Attributes:
        logits_TE: [T, E] scores before the softmax, at least fp32.
        probabilities_TE: [T, E] softmax of the logits; rows sum to one.
        experts_TK: [T, K] int64, global index of each choice, best first.
        weights_TK: [T, K] weight of each choice in the sum of expert outputs, at least fp32.
    """

    logits_TE: Tensor
    probabilities_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


class TopKRouter(nn.Module):
    """softmax over all experts, then the K largest.

    With ``normalize=none`` the weights are the probabilities (Switch Transformer, arXiv 2101.03961, eq. 2; OLMoE);
    with ``selected`` they are divided by their sum, which equals a softmax over the selected logits (Mixtral, arXiv
    2401.04088, section 2.1).

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: the rest.
        init_std: standard deviation of initial weights.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: TopKRouterConfig, init_std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize = config.normalize
        self.scale = config.scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.roles = {"weight": Role(Kind.ROUTER, init_std)}

    def forward(self, x_TD: Tensor) -> Routing:
        """Route tokens [T, D] of any dtype; computes in at least fp32 (bf16 logits diverged in the Switch paper)."""
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(precise), self.weight.to(precise))
        probabilities_TE = logits_TE.softmax(dim=1)
        experts_TK = top_k(logits_TE, self.top_k)
        weights_TK = probabilities_TE.gather(1, experts_TK)
        if self.normalize == "selected":
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        return Routing(logits_TE, probabilities_TE, experts_TK, self.scale * weights_TK)
