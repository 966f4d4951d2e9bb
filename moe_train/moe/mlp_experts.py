"""The experts of a classifier's head that one rank holds: small networks from a text's vector to the classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from moe_train.config.model import Compute
from moe_train.moe.exchange import Arrived
from moe_train.moe.roles import Kind, Role
from moe_train.ops.expert_mlp import ExpertMap, expert_mlp


class ExpertLinear(nn.Module):
    """One linear map with a bias of each expert held here.

    Args:
        in_dim: width N of what it reads.
        out_dim: width M of what it makes.
        experts: global indices of the experts held here, in order of places.
        std: standard deviation of the initial weights; biases start at zero.
    """

    def __init__(self, in_dim: int, out_dim: int, experts: Sequence[int], std: float) -> None:
        super().__init__()
        self.weight_LNM = nn.Parameter(torch.empty(len(experts), in_dim, out_dim))
        self.bias_LM = nn.Parameter(torch.empty(len(experts), out_dim))
        self.roles = {
            "weight_LNM": Role(Kind.EXPERT, std, experts),
            "bias_LM": Role(Kind.EXPERT, 0.0, experts),
        }

    @property
    def parts(self) -> ExpertMap:
        """Weight and bias."""
        return ExpertMap(self.weight_LNM, self.bias_LM)


class MLPExperts(nn.Module):
    """Experts each of which is a network of linear maps with ReLU between them.

    Args:
        dims: widths, from that of a token to that of what is made of it; two or more.
        experts: global indices of the experts held here, in order of places.
        std: standard deviation of the initial weights.
        compute: how their products are made.
    """

    def __init__(self, dims: Sequence[int], experts: Sequence[int], std: float, compute: Compute = "auto") -> None:
        super().__init__()
        self.compute: Compute = compute
        self.maps = nn.ModuleList(ExpertLinear(here, there, experts, std) for here, there in pairwise(dims))

    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum [R, C] over its experts held here."""
        choices = (arrived.experts_RK, arrived.weights_RK, arrived.num_assignments)
        maps = [own.parts for own in self.maps if isinstance(own, ExpertLinear)]
        return expert_mlp(arrived.rows_RD, *choices, maps, self.compute)
