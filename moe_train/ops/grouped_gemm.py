"""One matrix product per expert, over rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_gemm(x_ND: Tensor, w_LDF: Tensor, counts_L: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix.

    Args:
        x_ND: [N, D] rows; the first counts[0] belong to expert 0, the next counts[1] to expert 1, ...
        w_LDF: [L, D, F] matrices, same dtype as the rows.
        counts_L: [L] int64, rows per expert; zeros allowed; their sum is N.

    Returns:
        [N, F]. An expert without rows gets a gradient of zeros, not None.
    """
    if x_ND.device.type != "cpu" and x_ND.dtype in (torch.bfloat16, torch.float16):
        offsets_L = torch.cumsum(counts_L, dim=0).to(torch.int32)
        return F.grouped_mm(x_ND, w_LDF, offs=offsets_L)
    out: Tensor = _Loop.apply(x_ND, w_LDF, counts_L.tolist())  # type: ignore[no-untyped-call]
    return out


def grouped_gemm_reference(x_ND: Tensor, w_LDF: Tensor, counts_L: Tensor) -> Tensor:
    """Do the same by plain autograd."""
    parts = torch.split(x_ND, counts_L.tolist())
    return torch.cat([x_MD @ w_DF for x_MD, w_DF in zip(parts, w_LDF.unbind(), strict=True)])


class _Loop(torch.autograd.Function):
    """A loop over experts that writes each result, and each expert's weight gradient, once into its place."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_LDF: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, w_LDF)
        ctx.counts = counts
        out_NF = x_ND.new_empty(x_ND.shape[0], w_LDF.shape[2])
        _multiply(x_ND, w_LDF, counts, out_NF)
        return out_NF

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, w_LDF = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()  # a stride-0 gradient (of y.sum(), say) cannot be written into products
        dx_ND = torch.empty_like(x_ND)
        _multiply(grad_NF, w_LDF.transpose(1, 2), ctx.counts, dx_ND)
        dw_LDF = torch.empty_like(w_LDF)
        # A product over zero rows is zeros, so that empty experts need no case of their own.
        for x_MD, g_MF, dw_DF in zip(
            torch.split(x_ND, ctx.counts), torch.split(grad_NF, ctx.counts), dw_LDF, strict=True
        ):
            torch.mm(x_MD.t(), g_MF, out=dw_DF)
        return dx_ND, dw_LDF, None


def _multiply(x_ND: Tensor, w_LDF: Tensor, counts: list[int], out_NF: Tensor) -> None:
    for x_MD, w_DF, out_MF in zip(torch.split(x_ND, counts), w_LDF, torch.split(out_NF, counts), strict=True):
        torch.mm(x_MD, w_DF, out=out_MF)
