"""Causal attention as batched products around a softmax whose result is kept for the backward pass.

On a CPU torch's fused attention computes its scores again in the backward pass, in small products; here they are kept
instead, half of a square per head, and all products are large. Queries are taken in blocks, so that what no query of a
block sees (later keys, keys out of a window) is not computed at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries taken together. Fewer: less is computed in vain on the diagonal; more: larger products. The fastest of 128,
256 and S for S from 256 to 1024 (docs/performance.md)."""


def attend_by_products(
    q_BHSW: Tensor, k_BHSW: Tensor, v_BHSU: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """Attend to this and earlier positions. Scores are rounded to the dtype of the queries.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BHSW: [B, H, J, W] keys of the same dtype, one head for each of the queries, which are of the
            last S of the J positions.
        v_BHSU: [B, H, J, U] values.
        scale: multiplies the scores.
        window: positions that a query sees, its own included; None: all earlier ones.
        sinks_H: [H] scores without a value, of any dtype; None: none.

    Returns:
        [B, H, S, U], of which [B, S, H, U] is contiguous, as the output projection wants it.
    """
    y_BHSU: Tensor = _Products.apply(q_BHSW, k_BHSW, v_BHSU, scale, window, sinks_H)  # type: ignore[no-untyped-call]
    return y_BHSU


class _Products(torch.autograd.Function):
    """The blocks of queries one after the other. N stands for all heads of all sequences, J for keys in sight."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
    ) -> Tensor:
        (batch, heads, length, _), inner = q.shape, v.shape[-1]
        earlier = k.shape[2] - length
        q_NSW, k_NSW, v_NSU = (t.reshape(batch * heads, t.shape[2], -1) for t in (q, k, v))
        scaled_NSW = q_NSW * scale
        y_BSHU = v.new_empty(batch, length, heads, inner)
        kept, lost = [], []
        for start in range(0, length, BLOCK):
            rows, keys = in_sight(start, length, earlier, window)
            scores_NRJ = scaled_NSW[:, rows] @ k_NSW[:, keys].transpose(1, 2)
            shares_NRJ, lost_NR = shares_of(hide(scores_NRJ, earlier + start, keys, window), sinks_H)
            y_BHRU = (shares_NRJ @ v_NSU[:, keys]).view(batch, heads, -1, inner)
            y_BSHU[:, rows] = y_BHRU.transpose(1, 2)
            kept.append(shares_NRJ)
            lost.append(lost_NR)
        of_sinks = () if sinks_H is None else (torch.cat(lost, dim=1), y_BSHU)
        ctx.save_for_backward(q_NSW, k_NSW, v_NSU, *of_sinks, *kept)
        ctx.scale, ctx.window, ctx.earlier = scale, window, earlier
        ctx.sinks_dtype = None if sinks_H is None else sinks_H.dtype
        return y_BSHU.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q_NSW, k_NSW, v_NSU, *kept = ctx.saved_tensors
        dsinks_H = None
        if ctx.sinks_dtype is not None:
            lost_NS, y_BSHU, *kept = kept
            dsinks_H = gradient_of_sinks(dy, y_BSHU, lost_NS).to(ctx.sinks_dtype)
        batch, heads, length, _ = dy.shape
        dy_NSU = dy.reshape(batch * heads, length, -1)
        dq_NSW = torch.empty_like(q_NSW)
        # What blocks add up is added in at least fp32.
        dk_NSW, dv_NSU = (torch.zeros_like(t, dtype=precise(t.dtype)) for t in (k_NSW, v_NSU))
        for start, shares_NRJ in zip(range(0, length, BLOCK), kept, strict=True):
            rows, keys = in_sight(start, length, ctx.earlier, ctx.window)
            dy_NRU = dy_NSU[:, rows]
            dv_NSU[:, keys] += shares_NRJ.transpose(1, 2) @ dy_NRU
            dshares_NRJ = dy_NRU @ v_NSU[:, keys].transpose(1, 2)
            dscores_NRJ = torch._softmax_backward_data(dshares_NRJ, shares_NRJ, -1, shares_NRJ.dtype)
            dq_NSW[:, rows] = (dscores_NRJ @ k_NSW[:, keys]).mul_(ctx.scale)
            dk_NSW[:, keys] += dscores_NRJ.transpose(1, 2) @ q_NSW[:, rows]
        gradients = (dq_NSW, dk_NSW.mul_(ctx.scale).to(q_NSW.dtype), dv_NSU.to(v_NSU.dtype))
        dq, dk, dv = (t.view(batch, heads, t.shape[1], -1) for t in gradients)
        return dq, dk, dv, None, None, dsinks_H


def in_sight(start: int, length: int, earlier: int, window: int | None) -> tuple[slice, slice]:
    """Return the queries of the block that starts there, and the keys that any of them sees.

    Args:
        start: first query of the block.
        length: number of queries.
        earlier: keys before that of the first query.
        window: positions that a query sees; None: all earlier ones.
    """
    end = min(start + BLOCK, length)
    first = 0 if window is None else max(0, earlier + start + 1 - window)
    return slice(start, end), slice(first, earlier + end)


def hide(scores_NRJ: Tensor, position: int, keys: slice, window: int | None) -> Tensor:
    """Give what a query does not see the score -inf, in place. Without a window, that is on the diagonal alone.

    Args:
        scores_NRJ: [N, R, J] of R queries and the keys in sight.
        position: of the first of these queries.
        keys: positions of those keys.
        window: positions that a query sees; None: all earlier ones.
    """
    first = keys.start if window is not None else position
    rows_R1 = torch.arange(position, position + scores_NRJ.shape[1], device=scores_NRJ.device).unsqueeze(1)
    keys_J = torch.arange(first, keys.stop, device=scores_NRJ.device)
    hidden_RJ = keys_J > rows_R1
    if window is not None:
        hidden_RJ |= keys_J <= rows_R1 - window
    scores_NRJ[:, :, first - keys.start :].masked_fill_(hidden_RJ, float("-inf"))
    return scores_NRJ


def shares_of(scores_NRJ: Tensor, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the softmax over the keys [N, R, J], and what a sink takes of it [N, R] (without sinks: nothing, [0])."""
    if sinks_H is None:
        return scores_NRJ.softmax(dim=-1), scores_NRJ.new_empty(0)
    num, rows, _ = scores_NRJ.shape
    sinks_N = sinks_H.to(scores_NRJ.dtype).repeat(num // len(sinks_H))
    all_NRJ = torch.cat([scores_NRJ, sinks_N.view(-1, 1, 1).expand(-1, rows, 1)], dim=-1).softmax(dim=-1)
    return all_NRJ[..., :-1].contiguous(), all_NRJ[..., -1].clone()


def gradient_of_sinks(dy_BHSU: Tensor, y_BSHU: Tensor, lost_NS: Tensor) -> Tensor:
    """Return the gradient [H] of the sinks' scores, in at least fp32: each takes the mean away that has no value.

    A softmax gives a score the gradient share · (that of the share - their mean); a sink's share has none, and the mean
    over the keys is dy · y (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    batch, heads, length, _ = dy_BHSU.shape
    dtype = precise(dy_BHSU.dtype)
    means_BHS = (dy_BHSU.to(dtype) * y_BSHU.transpose(1, 2)).sum(dim=-1)
    return -(lost_NS.view(batch, heads, length) * means_BHS).sum(dim=(0, 2))


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or fp32 if it is narrower."""
    return torch.promote_types(dtype, torch.float32)
