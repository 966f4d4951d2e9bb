"""The experts of attention heads that one rank holds: linear maps that make values, or outputs (SwitchHead)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe_train.config.model import Compute
from moe_train.moe.exchange import Arrived
from moe_train.moe.roles import Kind, Role
from moe_train.ops.expert_linear import Heads, expert_linear


class HeadExperts(nn.Module):
    """Experts each of which belongs to one head, and stands between the token and that head's part of it.

    Where experts of some heads live elsewhere, so do their terms of the sum: the parts of those heads are zero here.

    Args:
        dim: width D of a token.
        width: W of a head.
        heads: number H of heads; a token's choices stand in their order.
        side: "out": experts read the token and make its parts, [R, H · W]; "in": they read those and make a token.
        experts: global indices of the experts held here, in order of places.
        num_experts: of the layer, over all ranks.
        std: standard deviation of the initial values.
        compute: how their products are made.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        heads: int,
        side: Literal["in", "out"],
        experts: Sequence[int],
        num_experts: int,
        std: float,
        compute: Compute = "auto",
    ) -> None:
        super().__init__()
        self.heads = Heads(heads, side)
        self.compute: Compute = compute
        read, made = (width, dim) if side == "in" else (dim, width)
        self.weight_LNM = nn.Parameter(torch.empty(len(experts), read, made))
        self.roles = {"weight_LNM": Role(Kind.EXPERT, std, experts, num_experts=num_experts)}

    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum over its experts held here: [R, H · W], or [R, D]."""
        choices = (arrived.experts_RK, arrived.weights_RK, arrived.num_assignments)
        return expert_linear(arrived.rows_RD, *choices, self.weight_LNM, self.heads, self.compute)
