"""One linear map per expert between a token and the parts that its heads have of it, as one differentiable function.

It is what values and outputs of attention are made of when experts make them (SwitchHead, arXiv 2312.07987, eq. 7 to
9): on one side stands the whole token, on the other one part per head. Segments, maps and products are those of the
feed-forward experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.config.model import Compute
from moe_train.ops.expert_ffn.compute import choose, lay_out
from moe_train.ops.expert_ffn.segments import Segments, counts_of, exact_segments
from moe_train.ops.grouped_gemm import Block, Products
from moe_train.ops.permute import RowMap, add_up


@dataclass(frozen=True)
class Heads:
    """Which side of the maps is cut into parts.

    Attributes:
        number: heads H. Of a token's K choices each head has a run of K / H, in order of heads.
        side: "out": an expert reads the whole token and adds to its head's part of the result; "in": it reads its
            head's part of the token and adds to the whole result.
    """

    number: int
    side: Literal["in", "out"]


@dataclass(frozen=True)
class How:
    """What is no tensor.

    Attributes:
        heads: which side is cut.
        products: how the products are made.
    """

    heads: Heads
    products: Products


def expert_linear(
    rows_RD: Tensor,
    experts_RK: Tensor,
    weights_RK: Tensor,
    num_assignments: int,
    w_LDF: Tensor,
    heads: Heads,
    compute: Compute = "auto",
) -> Tensor:
    """Return for each token the weighted sums of its experts' products, from the whole to the parts or back.

    The methods of ``compute`` are equal but for rounding. All but the reference can be differentiated once, write the
    gradient of the parameter once in its dtype, and give zeros to experts without rows.

    Args:
        rows_RD: [R, D] tokens, or [R, H · D] with a part per head; their dtype is that of all products.
        experts_RK: [R, K] int64, expert of each choice among the L held, or L for none; a run of K / H for each head.
        weights_RK: [R, K] weight of each choice; means nothing, and gets no gradient, where there is no expert.
        num_assignments: number of entries of ``experts_RK`` below L.
        w_LDF: [L, D, F] the experts; may be kept in a wider dtype than that of the rows, and is cast in use.
        heads: which side has parts.
        compute: the method.

    Returns:
        [R, H · F] with a part per head, or [R, F], in the dtype of the rows.
    """
    method = choose(rows_RD, compute)
    if method == "reference":
        return expert_linear_reference(rows_RD, experts_RK, weights_RK, w_LDF, heads)
    # A token's part is what the map counts as a token: its choices are those of one head.
    by_part = experts_RK.reshape(-1, experts_RK.shape[1] // heads.number)
    segments = exact_segments(by_part, len(w_LDF), num_assignments)
    segments, products = lay_out(
        segments, counts_of(by_part, len(w_LDF)), method, rows_RD, by_part.numel(), compute == "auto"
    )
    how = How(heads, products)
    sums_RF: Tensor = ExpertLinear.apply(rows_RD, weights_RK, w_LDF, segments, how)  # type: ignore[no-untyped-call]
    return sums_RF


class ExpertLinear(torch.autograd.Function):
    """Σ over a head's choices of weight · (x @ w).

    Saved for the backward pass are tokens, weights and parameter, all of which exist anyway, and the map: copies of
    rows are made again, and the gradient of a weight is taken from the product that gives that of the row.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_RK: Tensor, w_LDF: Tensor, segments: Segments, how: How) -> Tensor:
        """Return the sums; arguments as in `expert_linear`."""
        ctx.how, fine, products = how, segments.rows, how.products
        source, target = ends(fine, how.heads)
        x_MD = rows_RD.reshape(source.num_tokens, w_LDF.shape[1])
        weights_N1 = segments.weights_of(weights_RK).to(rows_RD.dtype).unsqueeze(1)
        y_NF = rows_RD.new_empty(segments.num_rows, w_LDF.shape[2])
        for block in products.blocks():
            x_ND = x_MD.index_select(0, source.tokens_N[block.rows])
            products.times(x_ND, w_LDF, block, y_NF[block.rows])
        sums_MF = add_up(y_NF.mul_(weights_N1), target)
        # All tensors, the map's too, so that a pass that is made again need not keep them.
        ctx.save_for_backward(rows_RD, weights_RK, w_LDF, fine.choices_N, fine.tokens_N, fine.slots_N, fine.starts_T)
        made_RF: Tensor = sums_MF.view(len(rows_RD), width_of(w_LDF, how.heads))
        return made_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those arguments that want one; there is no second derivative."""
        work = _Backward(ctx.how, ctx.saved_tensors, ctx.needs_input_grad)
        return *work.run(grad_RF.contiguous()), None, None


class _Backward:
    """One backward pass: its operands, and the gradients that are wanted.

    Args:
        how: as in the forward pass.
        saved: by it.
        needed: which of its arguments need a gradient.
    """

    def __init__(self, how: How, saved: tuple[Any, ...], needed: tuple[bool, ...]) -> None:
        self.products = how.products
        self.rows_RD, self.weights_RK, self.w_LDF, *fine = saved
        self.segments = Segments(RowMap(*fine))
        self.source, self.target = ends(self.segments.rows, how.heads)
        self.x_MD = self.rows_RD.reshape(self.source.num_tokens, self.w_LDF.shape[1])
        self.weights_N1 = self.segments.weights_of(self.weights_RK).to(self.rows_RD.dtype).unsqueeze(1)
        self.needs_rows, self.needs_weights, needs_w = needed[:3]
        self.dw_LDF = torch.empty_like(self.w_LDF) if needs_w else None

    def run(self, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, weights and parameter for that of the sums."""
        grad_MF = grad_RF.view(self.target.num_tokens, self.w_LDF.shape[2])
        dx_ND = self.rows_RD.new_empty(self.segments.num_rows, self.w_LDF.shape[1])
        dweights = [self._block(block, grad_MF, dx_ND[block.rows]) for block in self.products.blocks()]
        return (
            add_up(dx_ND, self.source).view_as(self.rows_RD) if self.needs_rows else None,
            self.segments.by_choice(torch.cat(dweights), self.weights_RK) if self.needs_weights else None,
            self.dw_LDF,
        )

    def _block(self, block: Block, grad_MF: Tensor, dx_ND: Tensor) -> Tensor:
        """Make the gradients of one block's rows and experts; return those of its weights [N]."""
        grad_NF = grad_MF.index_select(0, self.target.tokens_N[block.rows])
        x_ND = self.x_MD.index_select(0, self.source.tokens_N[block.rows])
        self.products.times(grad_NF, self.w_LDF.transpose(1, 2), block, dx_ND)
        dweights_N: Tensor = (x_ND * dx_ND).sum(dim=1, dtype=torch.promote_types(dx_ND.dtype, torch.float32))
        dx_ND.mul_(self.weights_N1[block.rows])
        if self.dw_LDF is not None:
            self.products.outer(x_ND, grad_NF.mul_(self.weights_N1[block.rows]), block, self.dw_LDF)
        return dweights_N


def ends(fine: RowMap, heads: Heads) -> tuple[RowMap, RowMap]:
    """Return where rows come from and where they go: from tokens to parts of them, or from parts to tokens.

    Args:
        fine: the map of parts, numbered token · H + head.
        heads: which side has them.
    """
    starts_T = fine.starts_T[:: heads.number].contiguous()
    whole = RowMap(fine.choices_N, fine.tokens_N // heads.number, fine.slots_N, starts_T)
    return (whole, fine) if heads.side == "out" else (fine, whole)


def width_of(w_LDF: Tensor, heads: Heads) -> int:
    """Return the width of a result."""
    return w_LDF.shape[2] * (heads.number if heads.side == "out" else 1)


def expert_linear_reference(
    rows_RD: Tensor, experts_RK: Tensor, weights_RK: Tensor, w_LDF: Tensor, heads: Heads
) -> Tensor:
    """Do what `expert_linear` does, one assignment after the other."""
    by_head, dtype = experts_RK.shape[1] // heads.number, rows_RD.dtype
    sums = [
        [rows_RD.new_zeros(w_LDF.shape[2]) for _ in range(heads.number if heads.side == "out" else 1)] for _ in rows_RD
    ]
    for row, experts in enumerate(experts_RK.tolist()):
        parts = rows_RD[row].chunk(heads.number) if heads.side == "in" else (rows_RD[row],) * heads.number
        for choice, expert in enumerate(experts):
            if expert < len(w_LDF):
                head = choice // by_head
                y_F = parts[head] @ w_LDF[expert].to(dtype) * weights_RK[row, choice].to(dtype)
                place = head if heads.side == "out" else 0
                sums[row][place] = sums[row][place] + y_F
    # The sum with nothing ties the result to all parameters, so that each gets a gradient, be it of zeros.
    nothing = 0.0 * w_LDF.sum().to(dtype)
    if not sums:
        return rows_RD.new_zeros(0, width_of(w_LDF, heads)) + nothing
    return torch.stack([torch.cat(of_row) for of_row in sums]) + nothing
