"""The experts of one rank: SwiGLU networks computed together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.moe.exchange import Arrived
from moe_train.moe.queues import count
from moe_train.moe.roles import Kind, Role
from moe_train.ops.grouped_gemm import grouped_gemm
from moe_train.ops.permute import gather_rows, map_rows, sum_rows


class Experts(nn.Module):
    """down(silu(gate(x)) · up(x)) for each of the experts held here (SwiGLU, arXiv 2002.05202).

    Args:
        dim: width D of a token.
        hidden_dim: hidden width F of one expert.
        experts: global indices of the experts held here.
        init_std: standard deviation of the initial values of gate and up.
        out_std: the same of down, which writes into the residual stream.
    """

    def __init__(self, dim: int, hidden_dim: int, experts: range, init_std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up_LDF2 = nn.Parameter(torch.empty(len(experts), dim, 2 * hidden_dim))
        self.down_LFD = nn.Parameter(torch.empty(len(experts), hidden_dim, dim))
        self.roles = {
            "gate_up_LDF2": Role(Kind.EXPERT, init_std, experts),
            "down_LFD": Role(Kind.EXPERT, out_std, experts),
        }

    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum [R, D] over its experts held here."""
        num_held = self.down_LFD.shape[0]
        dtype = arrived.rows_RD.dtype
        row_map = map_rows(arrived.experts_RK, num_held, arrived.num_assignments)
        counts_L = count(arrived.experts_RK, num_held)
        x_AD = gather_rows(arrived.rows_RD, row_map)
        weights_A1 = arrived.weights_RK.reshape(-1, 1).index_select(0, row_map.choices_N)
        gate_AF, up_AF = grouped_gemm(x_AD, self.gate_up_LDF2.to(dtype), counts_L).chunk(2, dim=1)
        # The weight commutes with the down projection, which has no bias; applied here, rows are added unweighted.
        h_AF = F.silu(gate_AF) * up_AF * weights_A1.to(dtype)
        return sum_rows(grouped_gemm(h_AF, self.down_LFD.to(dtype), counts_L), row_map)
