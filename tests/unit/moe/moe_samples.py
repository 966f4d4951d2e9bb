"""Small MoE layers, stand-in routers and experts whose results are known, and the layer as a plain loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.schema import BalanceConfig, CapacityConfig, DroplessConfig, TopKRouterConfig
from moe_train.models.initialise import initialise
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.exchange import Arrived, Exchange, LocalExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.router import Routing, TopKRouter

DIM, HIDDEN = 6, 5


def make_layer(
    num_experts: int = 4,
    top_k: int = 2,
    capacity: CapacityConfig = DroplessConfig(),  # noqa: B008 (frozen)
    normalize: str = "selected",
    exchange: Exchange | None = None,
) -> MoELayer:
    """A layer in fp64 with spread-out values, the same for every exchange."""
    exchange = exchange or LocalExchange(num_experts)
    config = TopKRouterConfig.model_validate({"normalize": normalize})
    layer = MoELayer(
        router=TopKRouter(DIM, num_experts, top_k, config, init_std=1.0),
        capacity=Capacity(capacity, num_experts, top_k),
        exchange=exchange,
        experts=Experts(DIM, HIDDEN, exchange.experts, init_std=0.5, out_std=0.5),
        balance=Balance(BalanceConfig()),
        shared=None,
    ).double()
    initialise(layer, seed=1)
    return layer


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B, S, D] in fp64, asking for its gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def routing_of(logits_TE: Tensor, top_k: int, normalize: str = "none") -> Routing:
    """What the router decides at given logits: its weight is the identity."""
    config = TopKRouterConfig.model_validate({"normalize": normalize})
    router = TopKRouter(logits_TE.shape[1], logits_TE.shape[1], top_k, config, init_std=1.0)
    router.weight = nn.Parameter(torch.eye(logits_TE.shape[1], dtype=logits_TE.dtype))
    routing: Routing = router(logits_TE)
    return routing


def routing_to(experts_TK: Tensor, num_experts: int) -> Routing:
    """A routing whose choices are given; its scores are even."""
    logits_TE = torch.zeros(experts_TK.shape[0], num_experts, dtype=torch.float64)
    weights_TK = torch.full(experts_TK.shape, 1.0 / experts_TK.shape[1], dtype=torch.float64)
    return Routing(logits_TE, logits_TE.softmax(dim=1), experts_TK, weights_TK)


class IdentityExperts(nn.Module):
    """Experts that return their token: what comes home is the token times the sum of its kept weights."""

    def __init__(self, num_held: int) -> None:
        super().__init__()
        self.num_held = num_held

    def forward(self, arrived: Arrived) -> Tensor:
        here_RK = arrived.experts_RK < self.num_held
        return arrived.rows_RD * (arrived.weights_RK * here_RK).sum(dim=1, keepdim=True)


def plain_loop(layer: MoELayer, x_TD: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """The layer token by token and expert by expert, with all its experts here."""
    rows = []
    for t, x_D in enumerate(x_TD):
        p_E = (layer.router.weight @ x_D).softmax(dim=0)
        chosen = p_E.argsort(descending=True, stable=True)[: layer.router.top_k]
        weights = p_E[chosen] / p_E[chosen].sum() if layer.router.normalize == "selected" else p_E[chosen]
        y_D = torch.zeros_like(x_D)
        for k, (e, weight) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            if kept_TK is None or kept_TK[t, k]:
                gate_F, up_F = (x_D @ layer.experts.gate_up_LDF2[e]).chunk(2)
                y_D = y_D + weight * ((F.silu(gate_F) * up_F) @ layer.experts.down_LFD[e])
        rows.append(y_D)
    return torch.stack(rows)
