"""DeepSpeed's MoE layer with SwiGLU networks as experts."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_train.benchmark.layer_case import WEIGHT_STD, LayerCase, LayerData, draw
from moe_train.benchmark.layer_pass import Candidate, LayerPass, variants_of
from moe_train.benchmark.timing import Timed
from moe_train.models.modules import FeedForward

NEEDS: Final = ("deepspeed",)
ABOUT: Final = (
    "drop_tokens=False: every expert's buffer is as long as the fullest expert's, so that skew multiplies the work; a "
    "loop over experts; router in fp32; experts are SwiGLU networks of this project, in the activations' format; a "
    "load-balance loss is computed, too, and not used; one process without a group"
)


def build(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build the layer.

    Args:
        arguments: ``case``, ``checks``.
    """
    case = LayerCase.parse(arguments["case"])
    data = draw(case)
    return variants_of(case, data, {"deepspeed": lambda: candidate(case, data)}, arguments["checks"])


def candidate(case: LayerCase, data: LayerData) -> Candidate:
    """Return DeepSpeed's layer with the values of a case: the second of two experts by the gates, without noise."""
    from deepspeed.moe.layer import MoE

    layer = MoE(
        case.dim,
        FeedForward(case.dim, case.expert_dim, "swiglu", WEIGHT_STD, WEIGHT_STD),
        num_experts=case.experts,
        k=case.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    gate, experts = layer.deepspeed_moe.gate, layer.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        gate.wg.weight.copy_(data.router_ED)
        for expert, gate_up_DF2, down_FD in zip(experts, data.gate_up_EDF2, data.down_EFD, strict=True):
            expert.gate_up.weight.copy_(gate_up_DF2.T)
            expert.down.weight.copy_(down_FD.T)
    experts.to(case.dtype)

    def output_of(x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = layer(x_BSD)[0]
        return y_BSD

    assert isinstance(gate, nn.Module), "TopKGate is a module"
    return Candidate(LayerPass.of(output_of, layer.parameters(), data), gate, chosen_of)


def chosen_of(decision: tuple[Any, ...]) -> Tensor:
    """Return the experts [T, K] of what the gate returned: loss, capacity, E, indices [K, T], and more."""
    indices_KT: Tensor = decision[3]
    return indices_KT.T
