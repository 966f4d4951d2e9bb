"""Causal grouped-query attention and rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_attention(q_BHSW: Tensor, k_BGSW: Tensor, v_BGSW: Tensor) -> Tensor:
    """Attend to this and earlier positions.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BGSW: [B, G, S, W] keys; each of the G heads serves H / G consecutive query heads (GQA, arXiv 2305.13245).
        v_BGSW: [B, G, S, W] values.

    Returns:
        [B, H, S, W].
    """
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    if shared > 1:
        k_BGSW, v_BGSW = (t.repeat_interleave(shared, dim=1) for t in (k_BGSW, v_BGSW))
    return F.scaled_dot_product_attention(q_BHSW, k_BGSW, v_BGSW, is_causal=True)


def causal_attention_reference(q_BHSW: Tensor, k_BGSW: Tensor, v_BGSW: Tensor) -> Tensor:
    """Do the same with a plain softmax, one head at a time."""
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    length = q_BHSW.shape[2]
    future_SS = torch.ones(length, length, dtype=torch.bool, device=q_BHSW.device).triu(1)
    heads = []
    for head in range(q_BHSW.shape[1]):
        k_BSW, v_BSW = k_BGSW[:, head // shared], v_BGSW[:, head // shared]
        scores_BSS = q_BHSW[:, head] @ k_BSW.transpose(1, 2) / q_BHSW.shape[3] ** 0.5
        heads.append(scores_BSS.masked_fill(future_SS, float("-inf")).softmax(dim=-1) @ v_BSW)
    return torch.stack(heads, dim=1)


def rotary_angles(length: int, width: int, theta: float, device: torch.device) -> Tensor:
    """Return the rotation angles [S, W/2] in fp64 (RoFormer, arXiv 2104.09864, eq. 15): position · theta^(-2i/W)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    positions_S = torch.arange(length, dtype=torch.float64, device=device)
    return torch.outer(positions_S, theta**-exponents)


def rotate(x_BHSW: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
    """Rotate the pairs (i, i + W/2) of each head by its position's angles (the half-split layout of Llama).

    Args:
        x_BHSW: [B, H, S, W] queries or keys; any dtype, computed in that of the tables.
        cos_SW: [S, W/2] cosines.
        sin_SW: [S, W/2] sines.
    """
    first, second = x_BHSW.to(cos_SW.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos_SW - second * sin_SW, second * cos_SW + first * sin_SW], dim=-1)
    return turned.to(x_BHSW.dtype)
