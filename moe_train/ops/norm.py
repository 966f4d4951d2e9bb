"""RMSNorm that keeps its input and one number per row for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.ops.pointwise import pointwise


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) · weight, computed in at least fp32 (arXiv 1910.07467, eq. 4).

    Args:
        x: [..., D].
        weight_D: [D] gains, of any dtype.
        eps: added to the mean square.

    Returns:
        [..., D] of the dtype of x.
    """
    y: Tensor = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y_TD, scale_T1 = normalised(x.reshape(-1, x.shape[-1]), weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale_T1)
        return y_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_T1 = ctx.saved_tensors
        rows = (-1, x.shape[-1])
        dx_TD, dweight_D = normalised_backward(dy.reshape(rows), x.reshape(rows), weight_D, scale_T1)
        return dx_TD.view(x.shape), dweight_D, None


@pointwise
def normalised(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed rows, and what each was multiplied with, [T, 1] of at least fp32."""
    precise_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = (precise_TD.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (precise_TD * scale_T1 * weight_D.to(precise_TD.dtype)).to(x_TD.dtype), scale_T1


@pointwise
def normalised_backward(dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and gains: scale · (g - n · mean(g · n)) with n = x · scale and g = dy · weight."""
    dtype = scale_T1.dtype
    unit_TD, precise_TD = x_TD * scale_T1, dy_TD.to(dtype)
    g_TD = precise_TD * weight_D.to(dtype)
    dx_TD = (g_TD - unit_TD * (g_TD * unit_TD).mean(dim=-1, keepdim=True)) * scale_T1
    return dx_TD.to(x_TD.dtype), (precise_TD * unit_TD).sum(dim=0).to(weight_D.dtype)


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Do the same, row by row."""
    precise = torch.promote_types(x.dtype, torch.float32)
    rows = [
        row_D / (row_D.square().mean() + eps).sqrt() * weight_D.to(precise) for row_D in x.to(precise).flatten(0, -2)
    ]
    return torch.stack(rows).view(x.shape).to(x.dtype)
