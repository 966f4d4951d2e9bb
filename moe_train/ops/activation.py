"""What stands between the two projections of a feed-forward network."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.config.model import Activation
from moe_train.ops.pointwise import pointwise

GATED = frozenset({"swiglu", "geglu", "swiglu_clamped"})
"""Activations whose first projection is twice as wide: gate, then up."""
CLAMP, GAIN = 7.0, 1.702
"""Limit and sigmoid gain of the clamped SwiGLU (gpt-oss model card, arXiv 2508.10925, and its published code)."""


def inner_width(kind: Activation, hidden_dim: int) -> int:
    """Return the columns of the first projection of a network with this hidden width."""
    return 2 * hidden_dim if kind in GATED else hidden_dim


def activate(h: Tensor, kind: Activation) -> Tensor:
    """Apply an activation to the output of the first projection.

    Args:
        h: [..., 2F] gate and up for the gated kinds, else [..., F].
        kind: swiglu and geglu (arXiv 2002.05202, eq. 5 and 6), swiglu_clamped (gpt-oss), gelu, relu.

    Returns:
        [..., F], the input of the second projection.
    """
    rows = activated(h.reshape(-1, h.shape[-1]), kind)
    return rows.view(*h.shape[:-1], rows.shape[-1])


@pointwise
def activated(h: Tensor, kind: Activation) -> Tensor:
    """Do the same on rows [T, 2F] or [T, F]."""
    match kind:
        case "relu":
            return F.relu(h)
        case "gelu":
            return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    match kind:
        case "swiglu":
            return F.silu(gate) * up
        case "geglu":
            return F.gelu(gate) * up
        case "swiglu_clamped":
            gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
            return (up + 1.0) * gate * torch.sigmoid(GAIN * gate)
        case _:
            assert_never(kind)
