"""Small MoE layers, stand-in routings and experts whose results are known, and the layer as a plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import FFNConfig
from moe_train.config.routing import CapacityConfig, DroplessConfig
from moe_train.dist.peers import Alone, Peers
from moe_train.models.initialise import initialise
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import Arrived, Exchange, LocalExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.routers import build_router
from moe_train.moe.routing import Routing

DIM, HIDDEN = 6, 5


def ffn_of(
    num_experts: int, top_k: int, capacity: CapacityConfig, balance: dict[str, Any] | None = None, **router: Any
) -> FFNConfig:
    """The configuration of a layer; ``router`` are the fields of that section, of kind topk if it says nothing."""
    sections = {"router": {"kind": "topk", **router}, "balance": balance or {}, "capacity": capacity.model_dump()}
    return FFNConfig.model_validate({"num_experts": num_experts, "top_k": top_k, "expert_dim": HIDDEN, **sections})


def make_layer(
    num_experts: int = 4,
    top_k: int = 2,
    capacity: CapacityConfig = DroplessConfig(),  # noqa: B008 (frozen)
    normalize: str = "selected",
    exchange: Exchange | None = None,
    ffn: FFNConfig | None = None,
) -> MoELayer:
    """A layer in fp64 with spread-out values, the same for every exchange; ``ffn`` stands for all that comes before."""
    ffn = ffn or ffn_of(num_experts, top_k, capacity, normalize=normalize)
    exchange = exchange or LocalExchange(ffn.num_experts)
    layer = MoELayer(
        router=build_router(ffn, DIM, init_std=1.0),
        capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k),
        exchange=exchange,
        experts=Experts(DIM, HIDDEN, exchange.experts, init_std=0.5, out_std=0.5),
        balance=Balance(ffn),
        shared=None,
    ).double()
    initialise(layer, seed=1)
    return layer


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B, S, D] in fp64, asking for its gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def context_of(
    batch: int, length: int, valid_BS: Tensor | None = None, seed: int = 0, peers: Peers | None = None, first: int = 0
) -> RoutingContext:
    """Sequences ``first`` and following of a global batch, whose ids are their places."""
    sequences_B = torch.arange(first, first + batch)
    ids_BS = sequences_B.unsqueeze(1) * length + torch.arange(length)
    return RoutingContext(ids_BS, sequences_B, valid_BS, seed, peers or Alone())


def routing_of(logits_TE: Tensor, top_k: int, normalize: str = "none", **router: Any) -> Routing:
    """What the router decides in evaluation at given logits: its weight is the identity."""
    num_tokens, num_experts = logits_TE.shape
    if "kind" not in router or router["kind"] in ("topk", "sigmoid", "group_limited"):
        router = {"normalize": normalize, **router}
    ffn = ffn_of(num_experts, top_k, DroplessConfig(), **router)
    module = build_router(ffn, num_experts, init_std=1.0).eval()
    module.weight = nn.Parameter(torch.eye(num_experts, dtype=logits_TE.dtype))
    routing: Routing = module(logits_TE, context_of(1, num_tokens))
    return routing


def routing_to(experts_TK: Tensor, num_experts: int, weights_TK: Tensor | None = None) -> Routing:
    """A routing whose choices are given; its scores are even, and so are its weights unless they are given, too."""
    logits_TE = torch.zeros(experts_TK.shape[0], num_experts, dtype=torch.float64)
    if weights_TK is None:
        weights_TK = torch.full(experts_TK.shape, 1.0 / experts_TK.shape[1], dtype=torch.float64)
    return Routing(logits_TE, logits_TE.softmax(dim=1), logits_TE, experts_TK, weights_TK, lambda _: weights_TK)


class IdentityExperts(nn.Module):
    """Experts that return their token: what comes home is the token times the sum of its kept weights."""

    def __init__(self, num_held: int) -> None:
        super().__init__()
        self.num_held = num_held

    def forward(self, arrived: Arrived) -> Tensor:
        here_RK = arrived.experts_RK < self.num_held
        return arrived.rows_RD * (arrived.weights_RK * here_RK).sum(dim=1, keepdim=True)


def plain_loop(layer: MoELayer, x_TD: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """A layer with a topk router token by token and expert by expert, with all its experts here."""
    ffn = layer.balance.ffn
    rows = []
    for t, x_D in enumerate(x_TD):
        p_E = (layer.router.weight @ x_D).softmax(dim=0)
        chosen = p_E.argsort(descending=True, stable=True)[: ffn.top_k]
        weights = p_E[chosen] / p_E[chosen].sum() if ffn.router.normalize == "selected" else p_E[chosen]
        y_D = torch.zeros_like(x_D)
        for k, (e, weight) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            if kept_TK is None or kept_TK[t, k]:
                gate_F, up_F = (x_D @ layer.experts.gate_up_LDF2[e]).chunk(2)
                y_D = y_D + weight * ((F.silu(gate_F) * up_F) @ layer.experts.down_LFD[e])
        rows.append(y_D)
    return torch.stack(rows)
