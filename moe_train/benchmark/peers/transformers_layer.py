"""transformers' Mixtral block: router and experts, all in the format of activations."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from moe_train.benchmark.layer_case import LayerCase, LayerData, draw
from moe_train.benchmark.layer_pass import Candidate, LayerPass, variants_of
from moe_train.benchmark.timing import Timed

NEEDS: Final = ("transformers",)
ABOUT: Final = {
    "eager": "a loop over experts; all weights, and the router's logits, in the activations' format",
    "grouped_mm": "torch's grouped product; all weights, and the router's logits, in the activations' format",
}


def build(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build the block.

    Args:
        arguments: ``case``, ``checks``, and ``experts``: how it computes them.
    """
    case = LayerCase.parse(arguments["case"])
    data, experts = draw(case), arguments["experts"]
    return variants_of(
        case, data, {f"transformers_{experts}": lambda: candidate(case, data, experts)}, arguments["checks"]
    )


def candidate(case: LayerCase, data: LayerData, experts: str) -> Candidate:
    """Return a Mixtral block with the values of a case."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    settings: dict[str, Any] = {
        "hidden_size": case.dim,
        "intermediate_size": case.expert_dim,
        "num_local_experts": case.experts,
        "num_experts_per_tok": case.top_k,
        "experts_implementation": experts,
    }
    block: Any = MixtralSparseMoeBlock(MixtralConfig(**settings))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        block.gate.weight.copy_(data.router_ED)
        block.experts.gate_up_proj.copy_(data.gate_up_EDF2.transpose(1, 2))
        block.experts.down_proj.copy_(data.down_EFD.transpose(1, 2))
    block.to(case.dtype)
    return Candidate(LayerPass.of(block, block.parameters(), data), block.gate, chosen_of)


def chosen_of(decision: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the experts [T, K] of a router's logits, weights and indices."""
    return decision[2]
