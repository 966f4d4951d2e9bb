"""torchtitan's MoE layer, on one process."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from moe_train.benchmark.layer_case import LayerCase, LayerData, draw
from moe_train.benchmark.layer_pass import Candidate, LayerPass, variants_of
from moe_train.benchmark.timing import Timed

NEEDS: Final = ("torchtitan", "spmd_types", "tyro", "triton")
"""The dispatcher's module imports Triton's kernels when it is imported; with one process none of them runs."""
ABOUT: Final = (
    "torch's grouped product, three projections, always in bf16; softmax scores normalised over the chosen; router in "
    "fp32, by a hook (its autocast to fp32 does nothing on CPU); weights kept in the activations' format; no "
    "load-balance bias"
)


def build(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build the layer.

    Args:
        arguments: ``case``, ``checks``.
    """
    case = LayerCase.parse(arguments["case"])
    data = draw(case)
    return variants_of(case, data, {"torchtitan": lambda: candidate(case, data)}, arguments["checks"])


def candidate(case: LayerCase, data: LayerData) -> Candidate:
    """Return torchtitan's layer with the values of a case."""
    layer = empty_layer(case)
    experts = layer.routed_experts.inner_experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(data.router_ED)
        gate_EDF, up_EDF = data.gate_up_EDF2.chunk(2, dim=2)
        experts.w1_EFD.copy_(gate_EDF.transpose(1, 2))
        experts.w3_EFD.copy_(up_EDF.transpose(1, 2))
        experts.w2_EDF.copy_(data.down_EFD.transpose(1, 2))
    layer.to(case.dtype)  # the buffer that counts tokens, too
    # Its router runs under autocast to fp32, which exists for GPUs only: on CPU its input is cast here.
    layer.router.to(torch.float32)
    layer.router.gate.register_forward_pre_hook(lambda gate, inputs: (inputs[0].to(torch.float32),))
    return Candidate(LayerPass.of(layer, layer.parameters(), data), layer.router, chosen_of)


def empty_layer(case: LayerCase) -> Any:
    """Return the layer without values."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    gate = Linear.Config(in_features=case.dim, out_features=case.experts)
    experts = GroupedExperts.Config(dim=case.dim, hidden_dim=case.expert_dim, num_experts=case.experts)
    return MoE.Config(
        num_experts=case.experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=experts,
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=case.experts, top_k=case.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=case.experts, gate=gate, top_k=case.top_k, score_func="softmax", route_norm=True
        ),
        load_balance_coeff=None,
    ).build()


def chosen_of(decision: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the experts [T, K] of the router's scores, indices [1, T, K] and all scores."""
    return decision[1][0]
