"""Routers: from tokens to a `Routing`. One file per idea; `build_router` chooses by the configuration's ``kind``."""

from __future__ import annotations

from functools import partial
from typing import Protocol, assert_never

from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.config.routing import (
    BaseRouterConfig,
    ExpertChoiceRouterConfig,
    GroupLimitedRouterConfig,
    GShardRouterConfig,
    HashRouterConfig,
    HierarchicalRouterConfig,
    NoisyTopKRouterConfig,
    SigmoidRouterConfig,
    SinkhornRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TopKSoftmaxRouterConfig,
)
from moe_train.moe.context import RoutingContext
from moe_train.moe.roles import Kind, Role
from moe_train.moe.routers.base import BaseRouter
from moe_train.moe.routers.expert_choice import ExpertChoiceRouter
from moe_train.moe.routers.gate import GateRouter
from moe_train.moe.routers.gshard import GShardRouter
from moe_train.moe.routers.hash import HashRouter
from moe_train.moe.routers.hierarchical import HierarchicalRouter
from moe_train.moe.routers.linear import learned_role
from moe_train.moe.routers.noisy import NoisyTopKRouter
from moe_train.moe.routers.scored import GroupLimit, ScoreRouter, Scoring
from moe_train.moe.routers.sinkhorn import SinkhornRouter
from moe_train.moe.routing import Routing

__all__ = ["Router", "build_router"]


class Router(Protocol):
    """What a layer asks of its router."""

    bias_E: Tensor | None
    """[E] bias on the choice, moved by loss-free balancing; None without it. No-op experts have one, too."""

    def __call__(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""


def build_router(ffn: FFNConfig, dim: int, init_std: float) -> Router:
    """Return the router of a layer, without values.

    Args:
        ffn: the layer; ``ffn.router`` says which router.
        dim: width D of a token.
        init_std: standard deviation of initial weights, where the router has no rule of its own.
    """
    config, num_experts, top_k = ffn.router, ffn.num_experts + ffn.num_noop_experts, ffn.top_k
    biased, role = ffn.balance.loss_free is not None, learned_role(init_std)
    score_router = partial(ScoreRouter, dim, num_experts, top_k)
    match config:
        case TopKRouterConfig(normalize=normalize):
            return score_router(config, role, biased, Scoring(sigmoid=False, normalised=normalize == "selected"))
        case TopKSoftmaxRouterConfig(gate_dim=int(gate_dim)):
            return GateRouter(dim, gate_dim, num_experts, top_k, config, role, biased)
        case TopKSoftmaxRouterConfig(bias=bias):
            return score_router(config, role, biased, Scoring(sigmoid=False, normalised=True, logit_bias=bias))
        case SigmoidRouterConfig(normalize=normalize):
            return score_router(config, role, biased, Scoring(sigmoid=True, normalised=normalize == "selected"))
        case SwitchRouterConfig():
            role = Role(Kind.ROUTER, (config.init_scale / dim) ** 0.5, truncated=True)
            return score_router(config, role, biased, Scoring(sigmoid=False, normalised=False))
        case GroupLimitedRouterConfig(normalize=normalize):
            sigmoid, limit = config.scores == "sigmoid", GroupLimit.of(config)
            return score_router(config, role, biased, Scoring(sigmoid, normalize == "selected", limit))
        case NoisyTopKRouterConfig():
            return NoisyTopKRouter(dim, num_experts, top_k, config)
        case GShardRouterConfig():
            return GShardRouter(dim, num_experts, config, init_std, biased)
        case ExpertChoiceRouterConfig():
            return ExpertChoiceRouter(dim, num_experts, top_k, config, role)
        case HashRouterConfig():
            return HashRouter(num_experts, top_k, config)
        case SinkhornRouterConfig():
            return SinkhornRouter(dim, num_experts, top_k, config, init_std)
        case BaseRouterConfig():
            return BaseRouter(dim, num_experts, top_k, config, role)
        case HierarchicalRouterConfig():
            return HierarchicalRouter(dim, num_experts, top_k, config, init_std)
        case _:
            assert_never(config)
