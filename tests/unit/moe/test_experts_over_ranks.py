"""Experts with biases and any activation behind an exchange: as if all were here, also in buffers of fixed size."""

from typing import Any

import torch
from moe_samples import DIM, HIDDEN, context_of, ffn_of, tokens
from spawn import run_ranks
from torch import Tensor

from moe_train.config.model import Activation
from moe_train.config.routing import DroplessConfig, FactorCapacityConfig
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.exchange import AllToAllExchange, Exchange, LocalExchange, PaddedExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.routers import build_router

EXPERTS, TOP_K, BATCH, LENGTH = 4, 2, 2, 5
CASES: list[tuple[Activation, bool, float | None]] = [
    ("swiglu_clamped", True, None),
    ("swiglu_clamped", True, 0.6),
    ("gelu", True, 0.6),
    ("relu", False, None),
    ("geglu", False, 0.6),
]
"""Activation, whether there are biases, capacity factor."""


def layer_of(activation: Activation, biased: bool, factor: float | None, exchange: Exchange, pad: bool) -> MoELayer:
    """The same values whoever holds them."""
    capacity = DroplessConfig() if factor is None and not pad else FactorCapacityConfig(factor=factor or 4.0, pad=pad)
    ffn = ffn_of(EXPERTS, TOP_K, capacity, kind="topk_softmax", bias=True)
    held = slice(exchange.experts.start, exchange.experts.stop)
    layer = MoELayer(
        router=build_router(ffn, DIM, init_std=1.0),
        capacity=Capacity(ffn.capacity, EXPERTS, TOP_K),
        exchange=exchange,
        experts=Experts(DIM, HIDDEN, exchange.experts, 0.5, 0.5, activation, biased),
        balance=Balance(ffn),
        shared=None,
    ).double()
    for place, (name, parameter) in enumerate(layer.named_parameters()):
        generator, sharded = torch.Generator().manual_seed(place), name.startswith("experts.")
        shape = (EXPERTS, *parameter.shape[1:]) if sharded else parameter.shape
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        parameter.data = values[held].clone() if sharded else values
    return layer


def results_of(layer: MoELayer, ranks: list[int]) -> dict[str, Tensor]:
    """Output and gradients of the tokens of these ranks."""
    x_BSD = torch.cat([tokens(BATCH, LENGTH, seed=rank).detach() for rank in ranks]).requires_grad_()
    y_BSD = layer(x_BSD, context_of(len(x_BSD), LENGTH)).y_BSD
    (y_BSD * torch.cat([tokens(BATCH, LENGTH, seed=100 + rank).detach() for rank in ranks])).sum().backward()
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y_BSD.detach(), "input gradient": x_BSD.grad, **gradients}


def all_cases(world: World) -> list[list[dict[str, Tensor]]]:
    """Per case what this rank finds by rows that travel once, and by buffers of fixed size."""
    mesh = build_mesh(world, world.size)
    found = []
    for activation, biased, factor in CASES:
        plain = AllToAllExchange(mesh.ep, EXPERTS)
        padded = PaddedExchange(mesh.ep, EXPERTS, plain)
        found.append(
            [
                results_of(layer_of(activation, biased, factor, exchange, pad), [world.rank])
                for exchange, pad in ((plain, False), (padded, True))
            ]
        )
    return found


def test_experts_elsewhere_are_as_good_as_experts_here() -> None:
    ranks = run_ranks(all_cases, 2)
    for case, (activation, biased, factor) in enumerate(CASES):
        layer = layer_of(activation, biased, factor, LocalExchange(EXPERTS), pad=False)
        whole = results_of(layer, [0, 1])
        assert not biased or whole["experts.down_bias_LD"].any()
        for way, name in enumerate(("rows that travel once", "buffers of fixed size")):
            parts = [rank[case][way] for rank in ranks]
            for key, expected in whole.items():
                pieces = [part[key] for part in parts]
                found = sum(pieces) if key.startswith("router.") else torch.cat(pieces)
                assert torch.allclose(found, expected, rtol=0, atol=1e-11), (CASES[case], name, key)
