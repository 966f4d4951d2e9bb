"""Causal attention: shared key heads, windows, sinks. And attention of a whole text to itself."""

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
    """Attend to this and earlier positions. Queries may be fewer than keys: they are of the last positions then.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BGSW: [B, G, J, W] keys of J >= S positions; each of the G heads serves H / G consecutive query heads (GQA,
            arXiv 2305.13245).
        v_BGSU: [B, G, J, U] values.
        scale: multiplies the scores; None: 1 / sqrt(W).
        window: positions that a query sees, its own included; None: all earlier ones.
        sinks_H: [H] scores that take part in the softmax of every query and have no value (gpt-oss); None: none.
        compute: fused: torch's scaled_dot_product_attention; products: `attend_by_products`; auto: the faster one. One
            query that is the last of several positions goes a shorter way (`attend_with_one_query`).

    Returns:
        [B, H, S, U].
    """
    scale = q_BHSW.shape[-1] ** -0.5 if scale is None else scale
    length, earlier = q_BHSW.shape[2], k_BGSW.shape[2] - q_BHSW.shape[2]
    assert earlier >= 0, "a query is at the position of a key"
    if length == 1 and earlier > 0:
        return attend_with_one_query(q_BHSW, k_BGSW, v_BGSU, scale, window, sinks_H)
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    if shared > 1:
        k_BGSW, v_BGSU = (t.repeat_interleave(shared, dim=1) for t in (k_BGSW, v_BGSU))
    if compute == "products" or (compute == "auto" and gains_by_products(q_BHSW, earlier + length, window)):
        return attend_by_products(q_BHSW, k_BGSW, v_BGSU, scale, window, sinks_H)
    return attend_fused(q_BHSW, k_BGSW, v_BGSU, scale, window, sinks_H)


def attend_fused(
    q_BHSW: Tensor, k_BHSW: Tensor, v_BHSU: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """Do it with torch's scaled_dot_product_attention; arguments and result as in `attend_by_products`."""
    length, earlier = q_BHSW.shape[2], k_BHSW.shape[2] - q_BHSW.shape[2]
    sinks = int(sinks_H is not None)
    if sinks_H is not None:
        q_BHSW, k_BHSW, v_BHSU = with_sinks(q_BHSW, k_BHSW, v_BHSU, sinks_H / scale)
    if earlier == 0 and (window is None or window >= length):
        y_BHSU = F.scaled_dot_product_attention(q_BHSW, k_BHSW, v_BHSU, is_causal=True, scale=scale)
    else:
        # torch's own triangle begins at the first key, whichever position the first query has.
        seen_SJ = window_mask(length, window or earlier + length, q_BHSW.device, earlier)
        seen_SJ = F.pad(seen_SJ, (sinks, 0, sinks, 0), value=True)
        y_BHSU = F.scaled_dot_product_attention(q_BHSW, k_BHSW, v_BHSU, attn_mask=seen_SJ, scale=scale)
    return y_BHSU[:, :, sinks:]


def attend_with_one_query(
    q_BH1W: Tensor, k_BGJW: Tensor, v_BGJU: Tensor, scale: float, window: int | None, sinks_H: Tensor | None
) -> Tensor:
    """Attend from the last position alone, as each token does that is generated.

    All in its window is seen: nothing is masked. Query heads that share keys stand in the place of several queries, so
    that no key is copied, and the work is that of reading keys and values once.

    Args:
        q_BH1W: [B, H, 1, W] query.
        k_BGJW: [B, G, J, W] keys.
        v_BGJU: [B, G, J, U] values.
        scale: multiplies the scores.
        window: positions that it sees, its own included; None: all.
        sinks_H: [H] scores without a value; None: none.

    Returns:
        [B, H, 1, U].
    """
    if window is not None:
        k_BGJW, v_BGJU = k_BGJW[:, :, -window:], v_BGJU[:, :, -window:]
    q_BGNW = q_BH1W.reshape(len(q_BH1W), k_BGJW.shape[1], -1, q_BH1W.shape[-1])  # N: H / G heads
    if sinks_H is None and k_BGJW.shape[-1] == v_BGJU.shape[-1]:
        y_BGNU = F.scaled_dot_product_attention(q_BGNW, k_BGJW, v_BGJU, scale=scale)
    else:
        # Else torch has no fused kernel, and its products round scores to the dtype of the keys.
        precise = torch.promote_types(q_BGNW.dtype, torch.float32)
        scores_BGNJ = (scale * q_BGNW.to(precise)) @ k_BGJW.to(precise).transpose(2, 3)
        if sinks_H is not None:
            sinks_BGN1 = sinks_H.to(precise).view(1, *q_BGNW.shape[1:3], 1).expand(len(q_BGNW), -1, -1, -1)
            scores_BGNJ = torch.cat([scores_BGNJ, sinks_BGN1], dim=-1)
        shares_BGNJ = scores_BGNJ.softmax(dim=-1)[..., : k_BGJW.shape[2]]
        y_BGNU = shares_BGNJ.to(v_BGJU.dtype) @ v_BGJU
    return y_BGNU.reshape(*q_BH1W.shape[:3], -1)


def gains_by_products(q_BHSW: Tensor, positions: int, window: int | None) -> bool:
    """Return whether products are faster: on a CPU, where there is a backward pass, for lengths that were measured.

    Args:
        q_BHSW: [B, H, S, W] queries.
        positions: number of keys.
        window: positions that a query sees; None: all earlier ones.
    """
    if q_BHSW.device.type != "cpu" or not (torch.is_grad_enabled() and q_BHSW.requires_grad):
        return False
    if min(positions, window or positions) > LONGEST:
        return False
    return q_BHSW.dtype == torch.bfloat16 or (q_BHSW.dtype == torch.float32 and positions >= SHORTEST_FP32)


def with_sinks(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSU: Tensor, scores_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put a sink before the first position, as a key that every query meets with its head's score.

    One more component does it: 1 in the queries, the score in the sink's key, 0 in all others. So torch's fused kernels
    serve, and the gradient of the sinks comes by itself. The sink's own query is there to keep the triangle square.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BHSW: [B, H, J, W] keys.
        v_BHSU: [B, H, J, U] values.
        scores_H: [H] scores before they are scaled.

    Returns:
        Queries [B, H, S + 1, W + 1], keys [B, H, J + 1, W + 1], values [B, H, J + 1, U].
    """
    batch, heads, _, width = q_BHSW.shape
    sink_BHW = F.pad(scores_H.to(k_BHSW.dtype).view(1, heads, 1, 1), (width, 0)).expand(batch, -1, -1, -1)
    q_BHSW = F.pad(F.pad(q_BHSW, (0, 1), value=1.0), (0, 0, 1, 0))
    k_BHSW = torch.cat([sink_BHW, F.pad(k_BHSW, (0, 1))], dim=2)
    return q_BHSW, k_BHSW, F.pad(v_BHSU, (0, 0, 1, 0))


def window_mask(length: int, window: int, device: torch.device, earlier: int = 0) -> Tensor:
    """Return [S, J] bool: whether a query sees key j: the one at position i if i - window < j <= i.

    Args:
        length: queries S, the last of the J positions.
        window: positions that a query sees, its own included.
        device: of the result.
        earlier: positions before the first query: J - S.
    """
    positions_J = torch.arange(earlier + length, device=device)
    distance_SJ = positions_J[earlier:].unsqueeze(1) - positions_J
    return (distance_SJ >= 0) & (distance_SJ < window)


def whole_attention(
    q_BHSW: Tensor,
    k_BGSW: Tensor,
    v_BGSU: Tensor,
    valid_BS: Tensor | None = None,
    scale: float | None = None,
    compute: Compute = "auto",
) -> Tensor:
    """Attend to all positions of a text: earlier, this and later ones.

    Args:
        q_BHSW: [B, H, S, W] queries.
        k_BGSW: [B, G, S, W] keys; each of the G heads serves H / G consecutive query heads.
        v_BGSU: [B, G, S, U] values.
        valid_BS: [B, S] bool, False for padding, which nobody sees; None: there is none.
        scale: multiplies the scores; None: 1 / sqrt(W).
        compute: fused: torch's scaled_dot_product_attention; products: two products around a softmax whose result is
            kept for the backward pass; auto: the faster one, by the rule of `causal_attention`.

    Returns:
        [B, H, S, U]. What stands at padding is finite, and means nothing.
    """
    scale = q_BHSW.shape[-1] ** -0.5 if scale is None else scale
    shared = q_BHSW.shape[1] // k_BGSW.shape[1]
    if shared > 1:
        k_BGSW, v_BGSU = (t.repeat_interleave(shared, dim=1) for t in (k_BGSW, v_BGSU))
    seen_B11J = None if valid_BS is None else seen_keys(valid_BS)[:, None, None]
    if compute == "products" or (compute == "auto" and gains_by_products(q_BHSW, q_BHSW.shape[2], None)):
        scores_BHSJ = (q_BHSW * scale) @ k_BGSW.transpose(2, 3)
        if seen_B11J is not None:
            scores_BHSJ = scores_BHSJ.masked_fill(~seen_B11J, float("-inf"))
        return scores_BHSJ.softmax(dim=-1) @ v_BGSU
    return F.scaled_dot_product_attention(q_BHSW, k_BGSW, v_BGSU, attn_mask=seen_B11J, scale=scale)


def seen_keys(valid_BS: Tensor) -> Tensor:
    """Return [B, S] bool: valid positions; all of a row that has none, as a softmax over nothing is undefined."""
    return valid_BS | ~valid_BS.any(dim=1, keepdim=True)


def whole_attention_reference(
    q_BHSW: Tensor,
    k_BGSW: Tensor,
    v_BGSU: Tensor,
    valid_BS: Tensor | None = None,
    scale: float | None = None,
    compute: Compute = "auto",
) -> Tensor:
    """Do the same with a plain softmax over the valid keys of one text, one head and one query at a time.

    At padding there are zeros.
    """
    shared, scale = q_BHSW.shape[1] // k_BGSW.shape[1], q_BHSW.shape[-1] ** -0.5 if scale is None else scale
    valid_BS = torch.ones_like(q_BHSW[:, 0, :, 0], dtype=torch.bool) if valid_BS is None else valid_BS
    y_BHSU = v_BGSU.new_zeros(*q_BHSW.shape[:3], v_BGSU.shape[3])
    for text, valid_S in enumerate(valid_BS):
        for head in range(q_BHSW.shape[1]):
            k_MW, v_MU = k_BGSW[text, head // shared, valid_S], v_BGSU[text, head // shared, valid_S]
            for i in valid_S.nonzero().flatten().tolist():
                y_BHSU[text, head, i] = (k_MW @ q_BHSW[text, head, i] * scale).softmax(dim=0) @ v_MU
    return y_BHSU


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
    earlier = k_BGSW.shape[2] - length
    scale = width**-0.5 if scale is None else scale
    heads = []
    for head in range(q_BHSW.shape[1]):
        k_BSW, v_BSU = k_BGSW[:, head // shared], v_BGSU[:, head // shared]
        rows = []
        for i in range(length):
            end = earlier + i + 1
            first = 0 if window is None else max(0, end - window)
            scores_BJ = (k_BSW[:, first:end] @ q_BHSW[:, head, i].unsqueeze(2)).squeeze(2) * scale
            if sinks_H is not None:
                scores_BJ = torch.cat([scores_BJ, sinks_H[head].expand(len(scores_BJ), 1)], dim=1)
            shares_BJ = scores_BJ.softmax(dim=1)[:, : end - first]
            rows.append((shares_BJ.unsqueeze(1) @ v_BSU[:, first:end]).squeeze(1))
        heads.append(torch.stack(rows, dim=1))
    return torch.stack(heads, dim=1)
