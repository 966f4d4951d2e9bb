"""Networks of several linear maps, one per expert, for tokens that chose them.

Unlike the feed-forward experts of a block (`ops.expert_ffn`) these are small and have any number of maps: each product
is one differentiable function, what stands between them is plain autograd. Segments and products are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.config.model import Compute
from moe_train.ops.expert_ffn.compute import choose, lay_out
from moe_train.ops.expert_ffn.segments import counts_of, exact_segments
from moe_train.ops.grouped_gemm import Products
from moe_train.ops.permute import gather_rows, sum_rows


class ExpertMap(NamedTuple):
    """One linear map of each of L experts.

    Attributes:
        weight_LNM: [L, N, M] from width N to width M.
        bias_LM: [L, M] what is added.
    """

    weight_LNM: Tensor
    bias_LM: Tensor


def expert_mlp(
    rows_RD: Tensor,
    experts_RK: Tensor,
    weights_RK: Tensor,
    num_assignments: int,
    maps: Sequence[ExpertMap],
    compute: Compute = "auto",
) -> Tensor:
    """Return for each token the sum over its experts of weight · (map(... relu(map(x)))).

    The methods of ``compute`` are equal but for rounding. All but the reference can be differentiated once, write the
    gradient of each parameter once in the parameter's dtype, and give zeros to experts without rows.

    Args:
        rows_RD: [R, D] tokens; their dtype is that of all products.
        experts_RK: [R, K] int64, expert of each choice among the L held, or L for none.
        weights_RK: [R, K] weight of each choice; means nothing, and gets no gradient, where there is no expert.
        num_assignments: number of entries of ``experts_RK`` below L.
        maps: of the experts, in order; parameters may be kept in a wider dtype than that of the rows.
        compute: the method.

    Returns:
        [R, C] in the dtype of the rows, C being the width of the last map.
    """
    method = choose(rows_RD, compute)
    if method == "reference":
        return expert_mlp_reference(rows_RD, experts_RK, weights_RK, maps)
    num_held = len(maps[0].weight_LNM)
    segments = exact_segments(experts_RK, num_held, num_assignments)
    counts_L = counts_of(experts_RK, num_held)
    segments, products = lay_out(segments, counts_L, method, rows_RD, experts_RK.numel(), compute == "auto")
    x_NM = gather_rows(rows_RD, segments.rows)
    for place, own in enumerate(maps):
        x_NM = grouped_linear(x_NM.relu() if place else x_NM, own, products)
    weights_N1 = segments.weights_of(weights_RK).to(x_NM.dtype).unsqueeze(1)
    return sum_rows(x_NM * weights_N1, segments.rows)


def grouped_linear(x_NM: Tensor, own: ExpertMap, products: Products) -> Tensor:
    """Return x · w + b of rows [N, M] in segments of experts."""
    y_NF: Tensor = _GroupedLinear.apply(x_NM, own.weight_LNM, own.bias_LM, products)  # type: ignore[no-untyped-call]
    return y_NF


class _GroupedLinear(torch.autograd.Function):
    """A bias is a matrix of one row, met by a one."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_LDF: Tensor, bias_LF: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(x_ND, w_LDF, bias_LF)
        ctx.products = products
        y_NF = x_ND.new_empty(len(x_ND), w_LDF.shape[2])
        for block in products.blocks():
            part_NF = products.times(x_ND[block.rows], w_LDF, block, y_NF[block.rows])
            ones_N1 = x_ND.new_ones(len(part_NF), 1)
            part_NF.add_(products.times(ones_N1, bias_LF.unsqueeze(1), block))
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_LDF, bias_LF = ctx.saved_tensors
        products, grad_NF = ctx.products, grad_NF.contiguous()
        dx_ND, dw_LDF, dbias_LF = (torch.empty_like(t) for t in (x_ND, w_LDF, bias_LF))
        for block in products.blocks():
            here_NF = grad_NF[block.rows]
            products.times(here_NF, w_LDF.transpose(1, 2), block, dx_ND[block.rows])
            products.outer(x_ND[block.rows], here_NF, block, dw_LDF)
            products.outer(here_NF.new_ones(len(here_NF), 1), here_NF, block, dbias_LF.unsqueeze(1))
        return dx_ND, dw_LDF, dbias_LF, None


def expert_mlp_reference(rows_RD: Tensor, experts_RK: Tensor, weights_RK: Tensor, maps: Sequence[ExpertMap]) -> Tensor:
    """Do what `expert_mlp` does, one assignment after the other; each parameter gets a gradient, be it of zeros."""
    dtype, held = rows_RD.dtype, len(maps[0].weight_LNM)
    nothing = 0.0 * sum(tensor.sum() for own in maps for tensor in own).to(dtype)  # type: ignore[union-attr]
    sums_RC = rows_RD.new_zeros(len(rows_RD), maps[-1].bias_LM.shape[1]) + nothing
    for row, experts in enumerate(experts_RK.tolist()):
        for choice, expert in enumerate(experts):
            if expert == held:
                continue
            x_M = rows_RD[row]
            for place, own in enumerate(maps):
                x_M = (x_M.relu() if place else x_M) @ own.weight_LNM[expert].to(dtype) + own.bias_LM[expert].to(dtype)
            y_RC = torch.zeros_like(sums_RC).index_copy(0, torch.tensor([row]), x_M.unsqueeze(0))
            sums_RC = sums_RC + weights_RK[row, choice].to(dtype) * y_RC
    return sums_RC
