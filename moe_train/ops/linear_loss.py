"""Output head and cross-entropy in one, with the gradients made in the forward pass: of logits only a chunk exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_train.ops.loss import IGNORE, cross_entropy_sum
from moe_train.ops.pointwise import pointwise

ROWS = 256
"""Rows of logits whose softmax is taken at one time where nothing is compiled: few enough to stay in a core's cache."""


def linear_cross_entropy_sum(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, chunk_tokens: int | None
) -> Tensor:
    """Return the summed negative log-likelihood of labels under the logits x · weight + bias, in nats.

    Logits are made in the dtype of x; losses, and the gradients of weight and bias over the chunks, are added up in at
    least fp32. Where a gradient is wanted it is made at once: a second backward pass through the same result fails.

    Args:
        x_TD: [T, D].
        weight_VD: [V, D] of any dtype, cast to that of x.
        bias_V: [V] of any dtype, or None.
        labels_T: [T] int64 targets; IGNORE counts for nothing.
        chunk_tokens: rows of logits that exist at one time; None: all.

    Returns:
        A scalar of at least fp32.
    """
    chunk = max(1, len(x_TD)) if chunk_tokens is None else chunk_tokens
    if not torch.is_grad_enabled():
        return loss_in_chunks(x_TD, weight_VD, bias_V, labels_T, chunk)
    total: Tensor = _LinearLoss.apply(x_TD, weight_VD, bias_V, labels_T, chunk)  # type: ignore[no-untyped-call]
    return total


def loss_in_chunks(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, chunk: int) -> Tensor:
    """Return the loss where no gradient is wanted."""
    weight_VD, bias_V = weight_VD.to(x_TD.dtype), None if bias_V is None else bias_V.to(x_TD.dtype)
    total = x_TD.new_zeros((), dtype=precise(x_TD.dtype))
    for x_CD, labels_C in zip(torch.split(x_TD, chunk), torch.split(labels_T, chunk), strict=True):
        total += cross_entropy_sum(F.linear(x_CD, weight_VD, bias_V), labels_C)
    return total


class _LinearLoss(torch.autograd.Function):
    """Chunk by chunk: logits, their gradients in the same memory, and what these give to x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor, chunk: int
    ) -> Tensor:
        dtype = precise(x_TD.dtype)
        cast_VD, cast_V = weight_VD.to(x_TD.dtype), None if bias_V is None else bias_V.to(x_TD.dtype)
        total, dx_TD = x_TD.new_zeros((), dtype=dtype), torch.empty_like(x_TD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype)
        dbias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=dtype)
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            scores_CV = F.linear(x_TD[rows], cast_VD, cast_V)
            total += losses_to_gradients(scores_CV, labels_T[rows])
            torch.mm(scores_CV, cast_VD, out=dx_TD[rows])
            dweight_VD += scores_CV.t() @ x_TD[rows]
            if dbias_V is not None:
                dbias_V += scores_CV.sum(dim=0, dtype=dtype)
        ctx.gradients = (dx_TD, dweight_VD, dbias_V)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of this loss were handed out by an earlier backward pass"
        dx_TD, dweight_VD, dbias_V = ctx.gradients
        ctx.gradients = None  # so that they may be scaled in place, and are not held any longer
        weight_dtype, bias_dtype = ctx.dtypes
        dx_TD.mul_(upstream.to(dx_TD.dtype)) if dx_TD.dtype == upstream.dtype else dx_TD.copy_(dx_TD * upstream)
        dbias_V = None if dbias_V is None else dbias_V.mul_(upstream).to(bias_dtype)
        return dx_TD, dweight_VD.mul_(upstream).to(weight_dtype), dbias_V, None, None


def losses_to_gradients(scores_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return the summed loss of a chunk of logits [C, V], and put its gradient in their place."""
    rows = len(scores_CV) if rows_to_gradients.compiled is not None else ROWS
    total = scores_CV.new_zeros((), dtype=precise(scores_CV.dtype))
    for part_RV, labels_R in zip(torch.split(scores_CV, rows), torch.split(labels_C, rows), strict=True):
        loss, gradient_RV = rows_to_gradients(part_RV, labels_R)
        total += loss
        part_RV.copy_(gradient_RV)
    return total


@pointwise
def rows_to_gradients(scores_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of rows of logits, and softmax - one-hot for those that have a label, else zeros."""
    has_label_R1 = (labels_R != IGNORE).unsqueeze(1)
    places_R1 = labels_R.clamp(min=0).unsqueeze(1)
    dtype = precise(scores_RV.dtype)
    top_R1, top_places_R1 = scores_RV.max(dim=-1, keepdim=True)
    shares_RV = scores_RV.softmax(dim=-1, dtype=dtype)
    # The largest share is at least 1/V, so that its logarithm loses nothing; torch's exp of all logits would be slow.
    totals_R1 = top_R1.to(dtype) - shares_RV.gather(1, top_places_R1).log()
    loss = ((totals_R1 - scores_RV.gather(1, places_R1)) * has_label_R1).sum()
    shares_RV.scatter_add_(1, places_R1, shares_RV.new_full((), -1.0).expand(places_R1.shape))
    return loss, shares_RV.mul_(has_label_R1).to(scores_RV.dtype)


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or fp32 if it is narrower."""
    return torch.promote_types(dtype, torch.float32)
