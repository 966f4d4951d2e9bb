"""The experts of one rank: feed-forward networks computed together, for tokens that chose them or for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_train.config.model import Activation, Compute
from moe_train.moe.exchange import Arrived
from moe_train.moe.roles import Kind, Role
from moe_train.ops.activation import activate, inner_width
from moe_train.ops.expert_ffn import Networks, expert_ffn
from moe_train.ops.rotary import Rotary


class ExpertNetworks(nn.Module):
    """The weights of down(activation(gate_up(x))) for each of the experts held here.

    Args:
        dim: width D of a token.
        hidden_dim: hidden width F of one expert.
        experts: global indices of the experts held here, in order of places.
        init_std: standard deviation of the initial values of the first projection.
        out_std: the same of the second, which writes into the residual stream.
        activation: which; with a gate the first projection is 2F wide, else F.
        biased: whether both projections have a bias.
    """

    gate_up_bias_LF2: nn.Parameter | None
    down_bias_LD: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        experts: Sequence[int],
        init_std: float,
        out_std: float,
        activation: Activation = "swiglu",
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        held, inner = len(experts), inner_width(activation, hidden_dim)
        self.gate_up_LDF2 = nn.Parameter(torch.empty(held, dim, inner))
        self.down_LFD = nn.Parameter(torch.empty(held, hidden_dim, dim))
        self.register_parameter("gate_up_bias_LF2", nn.Parameter(torch.empty(held, inner)) if biased else None)
        self.register_parameter("down_bias_LD", nn.Parameter(torch.empty(held, dim)) if biased else None)
        self.roles = {
            "gate_up_LDF2": Role(Kind.EXPERT, init_std, experts),
            "down_LFD": Role(Kind.EXPERT, out_std, experts),
            "gate_up_bias_LF2": Role(Kind.EXPERT, 0.0, experts),
            "down_bias_LD": Role(Kind.EXPERT, 0.0, experts),
        }


class Experts(ExpertNetworks):
    """Experts to which only those tokens come that chose them.

    Args:
        dim: see `ExpertNetworks`, as all but the last.
        hidden_dim: there.
        experts: there.
        init_std: there.
        out_std: there.
        activation: there.
        biased: there.
        compute: how their products are made.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        experts: Sequence[int],
        init_std: float,
        out_std: float,
        activation: Activation = "swiglu",
        biased: bool = False,
        compute: Compute = "auto",
    ) -> None:
        super().__init__(dim, hidden_dim, experts, init_std, out_std, activation, biased)
        self.compute: Compute = compute

    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum [R, D] over its experts held here."""
        networks = Networks(self.gate_up_LDF2, self.down_LFD, self.gate_up_bias_LF2, self.down_bias_LD, self.activation)
        choices = (arrived.experts_RK, arrived.weights_RK, arrived.num_assignments)
        return expert_ffn(arrived.rows_RD, *choices, networks, self.compute)


class DenseExperts(ExpertNetworks):
    """Experts to which every token comes."""

    def forward(self, x_RSD: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Return what each expert makes of tokens [R, S, D]: [R, S, L, D]. Positions mean nothing here."""
        x_ND = x_RSD.flatten(0, 1)
        inner_LNF = torch.matmul(x_ND, self.gate_up_LDF2.to(x_ND.dtype))
        if self.gate_up_bias_LF2 is not None:
            inner_LNF = inner_LNF + self.gate_up_bias_LF2.to(x_ND.dtype).unsqueeze(1)
        y_LND = torch.bmm(activate(inner_LNF, self.activation), self.down_LFD.to(x_ND.dtype))
        if self.down_bias_LD is not None:
            y_LND = y_LND + self.down_bias_LD.to(x_ND.dtype).unsqueeze(1)
        return y_LND.transpose(0, 1).view(*x_RSD.shape[:2], len(y_LND), x_RSD.shape[-1])
