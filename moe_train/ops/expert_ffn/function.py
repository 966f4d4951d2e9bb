"""The experts of a rank as one differentiable function: gather, product, activation, product, sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_train.config.model import Activation
from moe_train.ops.expert_ffn.pointwise import hidden_gradients, weighted_hidden
from moe_train.ops.expert_ffn.segments import Segments
from moe_train.ops.grouped_gemm import Block, Products
from moe_train.ops.permute import RowMap, add_up


@dataclass(frozen=True)
class How:
    """What is no tensor.

    Attributes:
        activation: which.
        products: how the products are made.
    """

    activation: Activation
    products: Products


class ExpertFFN(torch.autograd.Function):
    """Σ over a token's rows of weight · (down(activation(up(x)))).

    Saved for the backward pass are tokens, weights and parameters, all of which exist anyway, and what `saved_bytes`
    counts: the result of the first product, and the map. The rows of the tokens, the casts of the parameters and what
    comes out of the activation are made again: copies and pointwise work, no product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_RK: Tensor,
        up_LDF: Tensor,
        down_LFD: Tensor,
        up_bias_LF: Tensor | None,
        down_bias_LD: Tensor | None,
        segments: Segments,
        how: How,
    ) -> Tensor:
        """Return the sums [R, D]; arguments as in `expert_ffn`."""
        ctx.how, row_map, products = how, segments.rows, how.products
        weights_N1 = segments.weights_of(weights_RK).to(rows_RD.dtype).unsqueeze(1)
        inner_NF = rows_RD.new_empty(segments.num_rows, up_LDF.shape[2])
        y_ND = rows_RD.new_empty(segments.num_rows, rows_RD.shape[1])
        for block in products.blocks():
            part_NF, here_N1 = inner_NF[block.rows], weights_N1[block.rows]
            products.times(rows_RD.index_select(0, row_map.tokens_N[block.rows]), up_LDF, block, part_NF)
            # A bias is a matrix of one row, met by a one, or in the second product by the weight.
            if up_bias_LF is not None:
                part_NF.add_(products.times(torch.ones_like(here_N1), up_bias_LF.unsqueeze(1), block))
            h_NF = weighted_hidden(part_NF, here_N1, how.activation)
            part_ND = products.times(h_NF, down_LFD, block, y_ND[block.rows])
            if down_bias_LD is not None:
                part_ND.add_(products.times(here_N1, down_bias_LD.unsqueeze(1), block))
        # All tensors, the map's too, so that a pass that is made again need not keep them.
        parameters = (up_LDF, down_LFD, up_bias_LF, down_bias_LD)
        ctx.save_for_backward(
            rows_RD, weights_RK, *parameters, inner_NF,
            row_map.choices_N, row_map.tokens_N, row_map.slots_N, row_map.starts_T,
        )  # fmt: skip
        return add_up(y_ND, row_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of those arguments that want one; there is no second derivative."""
        work = _Backward(ctx.how, ctx.saved_tensors, ctx.needs_input_grad)
        return *work.run(grad_RD.contiguous()), None, None


class _Backward:
    """One backward pass: its operands, and the gradients that are wanted.

    Args:
        how: as in the forward pass.
        saved: by it.
        needed: which of its arguments need a gradient.
    """

    def __init__(self, how: How, saved: tuple[Any, ...], needed: tuple[bool, ...]) -> None:
        self.how = how
        self.rows_RD, self.weights_RK, self.up_LDF, self.down_LFD, _, self.down_bias_LD, self.inner_NF, *row_map = saved
        self.segments = Segments(RowMap(*row_map))
        self.weights_N1 = self.segments.weights_of(self.weights_RK).to(self.rows_RD.dtype).unsqueeze(1)
        self.needs_rows, self.needs_weights = needed[:2]
        parameters = zip(saved[2:6], needed[2:6], strict=True)
        self.gradients = [torch.empty_like(p) if needs else None for p, needs in parameters]

    def run(self, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, weights and parameters for that of the sums."""
        segments = self.segments
        dx_ND = self.rows_RD.new_empty(segments.num_rows if self.needs_rows else 0, self.rows_RD.shape[1])
        by_block = [self._block(block, grad_RD, dx_ND) for block in self.how.products.blocks()]
        return (
            add_up(dx_ND, segments.rows) if self.needs_rows else None,
            segments.by_choice(torch.cat(by_block), self.weights_RK) if self.needs_weights else None,
            *self.gradients,
        )

    def _block(self, block: Block, grad_RD: Tensor, dx_ND: Tensor) -> Tensor:
        """Make the gradients of one block's rows and parameters; return those of its weights [N]."""
        products, tokens_N = self.how.products, self.segments.rows.tokens_N[block.rows]
        grad_ND, weights_N1 = grad_RD.index_select(0, tokens_N), self.weights_N1[block.rows]
        dh_NF = products.times(grad_ND, self.down_LFD.transpose(1, 2), block)
        made = hidden_gradients(self.inner_NF[block.rows], weights_N1, dh_NF, self.how.activation)
        h_NF, dinner_NF, dweights_N = made
        up_LDF, down_LFD, up_bias_LF, down_bias_LD = self.gradients
        if down_LFD is not None:
            products.outer(h_NF, grad_ND, block, down_LFD)
        if up_LDF is not None:
            products.outer(self.rows_RD.index_select(0, tokens_N), dinner_NF, block, up_LDF)
        if up_bias_LF is not None:
            products.outer(torch.ones_like(weights_N1), dinner_NF, block, up_bias_LF.unsqueeze(1))
        if down_bias_LD is not None:
            products.outer(weights_N1, grad_ND, block, down_bias_LD.unsqueeze(1))
        if self.down_bias_LD is not None:
            answers_N1 = products.times(grad_ND, self.down_bias_LD.unsqueeze(2), block)
            dweights_N = dweights_N + answers_N1.squeeze(1)
        if self.needs_rows:
            products.times(dinner_NF, self.up_LDF.transpose(1, 2), block, dx_ND[block.rows])
        return dweights_N


def saved_bytes(num_rows: int, num_slots: int, num_tokens: int, inner_width: int, itemsize: int) -> int:
    """Return what one call of `ExpertFFN` saves beside its inputs, in bytes.

    Args:
        num_rows: N rows of the segments.
        num_slots: A of them that are some token's: what fills segments up is not.
        num_tokens: R.
        inner_width: columns of the first product, 2F with a gate, else F.
        itemsize: bytes of a number of the rows' dtype.
    """
    return num_rows * (inner_width * itemsize + 2 * 8) + 8 * (num_slots + num_tokens)
