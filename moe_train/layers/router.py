"""The choice of experts alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from moe_train.config.routing import NoisyTopKRouterConfig, RouterConfig, SigmoidRouterConfig, TopKRouterConfig
from moe_train.errors import Problem
from moe_train.layers.arguments import at_most, check, fraction, one_of, positive
from moe_train.layers.base import INIT_STD, aux_loss, context_of, fill, layer_config
from moe_train.moe.balance import Balance
from moe_train.moe.losses import RoutedTokens
from moe_train.moe.routers import build_router

GATING_TYPES = ("softmax", "sigmoid", "noisy_top_k")


class Choices(NamedTuple):
    """The experts of each token.

    Attributes:
        weights: [B, S, K] weight of each choice, at least fp32.
        experts: [B, S, K] int64 index of each choice, best first.
    """

    weights: Tensor
    experts: Tensor


class ExpertRouter(nn.Module):
    """The choice of experts alone, for experts of one's own.

    softmax (Mixtral) or sigmoid (DeepSeek-V3) over all experts, then the K largest; or the K largest after learned
    noise, then a softmax over these (noisy_top_k, Shazeer et al. 2017, eq. 3 to 5). aux_loss is 1.0 when the load is
    even and not weighted yet.

    >>> import torch
    >>> from moe_train import ExpertRouter
    >>> router = ExpertRouter(dim=16, num_experts=8, top_k=2)
    >>> (weights, experts), aux_loss = router(torch.randn(2, 10, 16))
    >>> weights.shape, experts.dtype, aux_loss.shape
    (torch.Size([2, 10, 2]), torch.int64, torch.Size([]))

    Args:
        dim: width D of a token.
        num_experts: experts E.
        top_k: experts K per token.
        gating_type: softmax, sigmoid or noisy_top_k.
        jitter_noise: in training the input is multiplied by U[1 - jitter, 1 + jitter].
        normalize_weights: the K weights of a token sum to one; impossible with top_k=1, where they would be constant.

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        gating_type: str = "softmax",
        *,
        jitter_noise: float = 0.0,
        normalize_weights: bool = True,
    ) -> None:
        check(
            positive(dim=dim, num_experts=num_experts, top_k=top_k),
            at_most("num_experts", num_experts, top_k=top_k),
            fraction(jitter_noise=jitter_noise),
            gating_problems(gating_type, normalize_weights, constant=top_k == 1 < num_experts),
        )
        super().__init__()
        router = gating(gating_type, normalize_weights, jitter_noise)
        ffn = layer_config(router, num_experts, top_k, expert_dim=1)
        self.router = build_router(ffn, dim, INIT_STD)
        self.balance = Balance(ffn)
        fill(self)

    def forward(self, hidden_states_BSD: Tensor) -> tuple[Choices, Tensor]:
        """Choose experts for [B, S, D] tokens; returns the choices [B, S, K] and the scalar load-balance loss."""
        context = context_of(hidden_states_BSD, self.training)
        routing = self.router(hidden_states_BSD.flatten(0, 1), context)
        tokens = RoutedTokens(routing, context)
        statistics = tuple(loss.measure(tokens) for loss in self.balance.losses)
        shape = (*hidden_states_BSD.shape[:2], -1)
        choices = Choices(routing.weights_TK.view(shape), routing.experts_TK.view(shape))
        return choices, aux_loss(self, self.balance, statistics, hidden_states_BSD)


def gating(gating_type: str, normalize: bool, jitter: float) -> RouterConfig:
    """Return the trainer's configuration of a router."""
    normalized: Literal["none", "selected"] = "selected" if normalize else "none"
    match gating_type:
        case "softmax":
            return TopKRouterConfig(normalize=normalized, jitter=jitter)
        case "sigmoid":
            return SigmoidRouterConfig(normalize=normalized, jitter=jitter)
        case _:
            return NoisyTopKRouterConfig(jitter=jitter)


def gating_problems(gating_type: str, normalize: bool, constant: bool) -> list[Problem]:
    """Return what is wrong with the kind of gating.

    Args:
        gating_type: softmax, sigmoid or noisy_top_k.
        normalize: whether weights are to sum to one.
        constant: whether one of several experts is chosen, whose normalised weight is 1 whatever the router thinks.
    """
    if unknown := one_of(GATING_TYPES, gating_type=gating_type):
        return unknown
    if gating_type == "noisy_top_k" and not normalize:
        rule = "the weights of noisy_top_k are a softmax over the chosen experts"
        return [Problem("normalize_weights", False, rule, "set normalize_weights=True")]
    if constant and normalize:
        rule = "normalised, the weight of one expert is always 1 and the router gets no gradient from the task"
        return [Problem("top_k", 1, rule, "raise it, or set normalize_weights=False with softmax or sigmoid")]
    return []
