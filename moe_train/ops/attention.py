"""Causal attention: shared key heads, windows, sinks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.ops.attention_products import attend_by_products

Compute = Literal["auto", "fused", "products"]
LONGEST = 1024
"""Of what a query sees where `auto` chooses products: they keep a number for each position that each query sees."""
SHORTEST_FP32 = 512
"""In fp32, where fused attention is not as slow, products do not gain below this (docs/performance.md)."""


def causal_attention(
    q_BHSW: Tensor,
    k_BGSW: Tensor,
    v_BGSU: Tensor,
    scale: float | None = None,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    compute: Compute = "auto",
) -> Tensor:
    """Attend to this and earlier positions.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BGSW: [B, G, S, W] keys; each of the G heads serves H / G consecutive query heads (GQA, arXiv 2305.13245).
        v_BGSU: [B, G, S, U] values.
        scale: multiplies the scores; None: 1 / sqrt(W).
        window: positions that a query sees, its own included; None: all earlier ones.
        sinks_H: [H] scores that take part in the softmax of every query and have no value (gpt-oss); None: none.
        compute: fused: torch's scaled_dot_product_attention; products: `attend_by_products`; auto: the faster one.

    Returns:
        [B, H, S, U].
    """
    scale = q_BHSW.shape[-1] ** -0.5 if scale is None else scale
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    if shared > 1:
        k_BGSW, v_BGSU = (t.repeat_interleave(shared, dim=1) for t in (k_BGSW, v_BGSU))
    if compute == "products" or (compute == "auto" and gains_by_products(q_BHSW, window)):
        return attend_by_products(q_BHSW, k_BGSW, v_BGSU, scale, window, sinks_H)
    if sinks_H is not None:
        q_BHSW, k_BGSW, v_BGSU = with_sinks(q_BHSW, k_BGSW, v_BGSU, sinks_H / scale)
    length, sinks = q_BHSW.shape[2], int(sinks_H is not None)
    if window is None or window >= length - sinks:
        y_BHSU = F.scaled_dot_product_attention(q_BHSW, k_BGSW, v_BGSU, is_causal=True, scale=scale)
    else:
        seen_SS = window_mask(length - sinks, window, q_BHSW.device)
        seen_SS = F.pad(seen_SS, (sinks, 0, sinks, 0), value=True)
        y_BHSU = F.scaled_dot_product_attention(q_BHSW, k_BGSW, v_BGSU, attn_mask=seen_SS, scale=scale)
    return y_BHSU[:, :, sinks:]


def gains_by_products(q_BHSW: Tensor, window: int | None) -> bool:
    """Return whether products are faster: on a CPU, where there is a backward pass, for lengths that were measured."""
    if q_BHSW.device.type != "cpu" or not (torch.is_grad_enabled() and q_BHSW.requires_grad):
        return False
    length = q_BHSW.shape[2]
    if min(length, window or length) > LONGEST:
        return False
    return q_BHSW.dtype == torch.bfloat16 or (q_BHSW.dtype == torch.float32 and length >= SHORTEST_FP32)


def with_sinks(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSU: Tensor, scores_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put a sink before the first position, as a key that every query meets with its head's score.

    One more component does it: 1 in the queries, the score in the sink's key, 0 in all others. So torch's fused kernels
    serve, and the gradient of the sinks comes by itself. The sink's own query is there to keep the triangle square.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BHSW: [B, H, S, W] keys.
        v_BHSU: [B, H, S, U] values.
        scores_H: [H] scores before they are scaled.

    Returns:
        Queries and keys [B, H, S + 1, W + 1], values [B, H, S + 1, U].
    """
    batch, heads, _, width = q_BHSW.shape
    sink_BHW = F.pad(scores_H.to(k_BHSW.dtype).view(1, heads, 1, 1), (width, 0)).expand(batch, -1, -1, -1)
    q_BHSW = F.pad(F.pad(q_BHSW, (0, 1), value=1.0), (0, 0, 1, 0))
    k_BHSW = torch.cat([sink_BHW, F.pad(k_BHSW, (0, 1))], dim=2)
    return q_BHSW, k_BHSW, F.pad(v_BHSU, (0, 0, 1, 0))


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return [S, S] bool: whether query i sees key j, that is i - window < j <= i."""
    positions_S = torch.arange(length, device=device)
    distance_SS = positions_S.unsqueeze(1) - positions_S
    return (distance_SS >= 0) & (distance_SS < window)


def causal_attention_reference(
    q_BHSW: Tensor,
    k_BGSW: Tensor,
    v_BGSU: Tensor,
    scale: float | None = None,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    compute: Compute = "auto",
) -> Tensor:
    """Do the same with a plain softmax, one head and one query at a time, whatever ``compute`` is."""
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    length, width = q_BHSW.shape[2:]
    scale = width**-0.5 if scale is None else scale
    heads = []
    for head in range(q_BHSW.shape[1]):
        k_BSW, v_BSU = k_BGSW[:, head // shared], v_BGSU[:, head // shared]
        rows = []
        for i in range(length):
            first = 0 if window is None else max(0, i + 1 - window)
            scores_BJ = (k_BSW[:, first : i + 1] @ q_BHSW[:, head, i].unsqueeze(2)).squeeze(2) * scale
            if sinks_H is not None:
                scores_BJ = torch.cat([scores_BJ, sinks_H[head].expand(len(scores_BJ), 1)], dim=1)
            shares_BJ = scores_BJ.softmax(dim=1)[:, : i + 1 - first]
            rows.append((shares_BJ.unsqueeze(1) @ v_BSU[:, first : i + 1]).squeeze(1))
        heads.append(torch.stack(rows, dim=1))
    return torch.stack(heads, dim=1)
