"""This project's layer and its dense twin as variants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.benchmark.layer_case import WEIGHT_STD, LayerCase, LayerData, draw
from moe_train.benchmark.layer_pass import Candidate, LayerPass, variants_of
from moe_train.benchmark.timing import Timed
from moe_train.config.model import Compute, ModelConfig
from moe_train.models.build import build_moe
from moe_train.models.modules import FeedForward
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.routing import Routing
from moe_train.ops.pointwise import fuse

DENSE = "dense"
"""The baseline: weights as the trainer keeps them, fp32, cast in each pass."""
BF16_WEIGHTS = ", bf16 weights"
ROUTED_AHEAD = ", routed ahead"
FUSED = {"none": "", "pointwise": ", fused"}
"""How variants are named under each value of train.compile."""


class RoutedAhead(nn.Module):
    """A router that has decided before, as if it cost nothing.

    Args:
        routing: its decision, without gradient.
    """

    bias_E: Tensor | None

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.bias_E = None
        self.routing = routing

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Return the decision."""
        return self.routing


def build(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build the dense twin and the layer, with each way of computing.

    Args:
        arguments: ``case``, ``compute`` (list), ``compile``, ``checks``. What is fused is a matter of the process.
    """
    fuse(None if arguments["compile"] == "none" else "inductor")
    suffix = FUSED[arguments["compile"]]
    case = LayerCase.parse(arguments["case"])
    data, twin = draw(case), draw(case.dense)
    halves = ("", BF16_WEIGHTS) if case.precision == "bf16" else ("",)
    checks = arguments["checks"]
    dense = {f"{DENSE}{half}": partial(dense_candidate, case.dense, twin, half != "") for half in halves}
    ours: dict[str, Callable[[], Candidate]] = {}
    for compute in arguments["compute"]:
        name = f"ours {compute}"
        ours |= {f"{name}{half}": partial(our_candidate, case, data, compute, half != "") for half in halves}
        ours[f"{name}{ROUTED_AHEAD}"] = partial(routed_ahead, case, data, compute)
    made = variants_of(case.dense, twin, dense, checks) | variants_of(case, data, ours, checks)
    return {renamed(name, suffix): value for name, value in made.items()}


def renamed(name: str, suffix: str) -> str:
    """Return the name of a variant, or of a fact of it, with a suffix to the variant's."""
    variant, colon, fact = name.partition(":")
    return f"{variant}{suffix}{colon}{fact}"


def dense_candidate(case: LayerCase, data: LayerData, in_bf16: bool) -> Candidate:
    """Return a SwiGLU network."""
    network = FeedForward(case.dim, case.expert_dim, "swiglu", WEIGHT_STD, WEIGHT_STD)
    with torch.no_grad():
        network.gate_up.weight.copy_(data.gate_up_EDF2[0].T)
        network.down.weight.copy_(data.down_EFD[0].T)
    if in_bf16:
        network.to(torch.bfloat16)
    return Candidate(LayerPass.of(network, network.parameters(), data))


def our_layer(case: LayerCase, data: LayerData, compute: Compute) -> MoELayer:
    """Return the layer as a model would have it, with the values of a case."""
    layer = build_moe(ModelConfig(dim=case.dim, ffn=case.ffn(compute)), LocalExchange(case.experts), WEIGHT_STD)
    assert isinstance(layer.router, nn.Module), "routers are modules"
    assert isinstance(layer.experts, Experts), "this layer is a feed-forward one"
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(data.router_ED)
        layer.experts.gate_up_LDF2.copy_(data.gate_up_EDF2)
        layer.experts.down_LFD.copy_(data.down_EFD)
    return layer


def our_candidate(case: LayerCase, data: LayerData, compute: Compute, in_bf16: bool) -> Candidate:
    """Return the whole layer: router, plan, experts, record."""
    layer = our_layer(case, data, compute)
    if in_bf16:
        layer.experts.to(torch.bfloat16)
    assert isinstance(layer.router, nn.Module), "routers are modules"
    run = LayerPass.of(partial(output_of, layer), layer.parameters(), data)
    return Candidate(run, layer.router, lambda routing: routing.experts_TK)


def routed_ahead(case: LayerCase, data: LayerData, compute: Compute) -> Candidate:
    """Return the layer without the router's own work; what follows from its decision is still done."""
    layer = our_layer(case, data, compute)
    context = RoutingContext.of(torch.arange(case.tokens).view(1, -1))
    with torch.no_grad():
        layer.router = RoutedAhead(layer.router(data.x_BSD[0], context))
    return Candidate(LayerPass.of(partial(output_of, layer), layer.parameters(), data))


def output_of(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    """Return what a layer makes of its tokens."""
    y_BSD: Tensor = layer(x_BSD).y_BSD
    return y_BSD
