"""The experts of one rank: feed-forward networks computed together, for tokens that chose them or for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_train.config.model import Activation
from moe_train.moe.exchange import Arrived
from moe_train.moe.queues import count
from moe_train.moe.roles import Kind, Role
from moe_train.ops.activation import activate, inner_width
from moe_train.ops.grouped_gemm import grouped_gemm
from moe_train.ops.permute import gather_rows, map_rows, sum_rows
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
    """Experts to which only those tokens come that chose them."""

    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum [R, D] over its experts held here."""
        num_held = self.down_LFD.shape[0]
        dtype = arrived.rows_RD.dtype
        row_map = map_rows(arrived.experts_RK, num_held, arrived.num_assignments)
        counts_L = count(arrived.experts_RK, num_held)
        x_AD = gather_rows(arrived.rows_RD, row_map)
        weights_A1 = arrived.weights_RK.reshape(-1, 1).index_select(0, row_map.choices_N).to(dtype)
        inner_AF = grouped_gemm(x_AD, self.gate_up_LDF2.to(dtype), counts_L)
        if self.gate_up_bias_LF2 is None or self.down_bias_LD is None:
            # The weight commutes with a down projection without bias; applied here, rows are added unweighted.
            h_AF = activate(inner_AF, self.activation) * weights_A1
            return sum_rows(grouped_gemm(h_AF, self.down_LFD.to(dtype), counts_L), row_map)
        experts_A = arrived.experts_RK.reshape(-1).index_select(0, row_map.choices_N)
        inner_AF = inner_AF + self.gate_up_bias_LF2.to(dtype).index_select(0, experts_A)
        h_AF = activate(inner_AF, self.activation) * weights_A1
        y_AD = grouped_gemm(h_AF, self.down_LFD.to(dtype), counts_L)
        y_AD = torch.addcmul(y_AD, weights_A1, self.down_bias_LD.to(dtype).index_select(0, experts_A))
        return sum_rows(y_AD, row_map)


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
