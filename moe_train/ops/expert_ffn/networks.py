"""What the experts of a rank compute, by plain autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.model import Activation
from moe_train.ops.activation import activate
from moe_train.ops.grouped_gemm import grouped_gemm_reference


@dataclass(frozen=True)
class Networks:
    """The networks down(activation(up(x))) of L experts.

    Attributes:
        up_LDF: [L, D, F'] first projections; F' is 2F for activations with a gate (gate, then up), else F.
        down_LFD: [L, F, D] second projections.
        up_bias_LF: [L, F'] biases of the first; None: none.
        down_bias_LD: [L, D] biases of the second; None: none.
        activation: which.
    """

    up_LDF: Tensor
    down_LFD: Tensor
    up_bias_LF: Tensor | None
    down_bias_LD: Tensor | None
    activation: Activation

    @property
    def num_held(self) -> int:
        """Number L of experts."""
        return len(self.up_LDF)


def expert_ffn_reference(rows_RD: Tensor, experts_RK: Tensor, weights_RK: Tensor, networks: Networks) -> Tensor:
    """Do what `expert_ffn` does, one expert after the other; each gets a gradient, be it of zeros."""
    sums_RD = torch.zeros_like(rows_RD)
    held, dtype = range(networks.num_held), rows_RD.dtype
    chosen = [torch.nonzero(experts_RK == expert) for expert in held]  # [M, 2]: token and choice
    counts_L = torch.tensor([len(places_M2) for places_M2 in chosen])
    places_A2 = torch.cat(chosen)
    tokens_A, weights_A1 = places_A2[:, 0], weights_RK[places_A2[:, 0], places_A2[:, 1], None].to(dtype)
    inner_AF = grouped_gemm_reference(rows_RD[tokens_A], networks.up_LDF.to(dtype), counts_L)
    experts_A = experts_RK[places_A2[:, 0], places_A2[:, 1]]
    if networks.up_bias_LF is not None:
        inner_AF = inner_AF + networks.up_bias_LF.to(dtype)[experts_A]
    y_AD = grouped_gemm_reference(activate(inner_AF, networks.activation), networks.down_LFD.to(dtype), counts_L)
    if networks.down_bias_LD is not None:
        y_AD = y_AD + networks.down_bias_LD.to(dtype)[experts_A]
    return sums_RD.index_add(0, tokens_A, y_AD * weights_A1)
