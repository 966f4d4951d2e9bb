"""Experts that are computed one after the other, as they come into memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from moe_train.config.model import Activation, Compute
from moe_train.inference.offload.cache import Cache
from moe_train.moe.exchange import Arrived
from moe_train.ops.expert_ffn.compute import choose, lay_out
from moe_train.ops.expert_ffn.pointwise import weighted_hidden
from moe_train.ops.expert_ffn.segments import counts_of, exact_segments
from moe_train.ops.grouped_gemm import BatchedProducts, Block, GroupedProducts, LoopProducts, Products
from moe_train.ops.permute import add_up


class OffloadedExperts(nn.Module):
    """Takes the place of `moe.experts.Experts` in a layer: the same rows, products and sums, expert by expert.

    On a CPU results are equal bit for bit where the hidden width is a multiple of 32. Else they are but for the last
    place: torch's activations compute by other code what does not fill a register, and more rows leave another rest.

    Args:
        cache: where the experts of this layer come from.
        num_held: experts L on this rank.
        activation: which.
        compute: how products are made; ``reference`` is taken as ``loop``.
    """

    def __init__(self, cache: Cache, num_held: int, activation: Activation, compute: Compute) -> None:
        super().__init__()
        self.cache, self.num_held, self.activation = cache, num_held, activation
        self.compute: Compute = "loop" if compute == "reference" else compute

    @torch.no_grad()
    def forward(self, arrived: Arrived) -> Tensor:
        """Return for each row the weighted sum [R, D] over its experts held here. There is no gradient."""
        rows_RD, experts_RK = arrived.rows_RD, arrived.experts_RK
        counts_L = counts_of(experts_RK, self.num_held)
        segments = exact_segments(experts_RK, self.num_held, arrived.num_assignments)
        method = choose(rows_RD, self.compute)
        # As in memory, padding included: products of other numbers of rows are rounded differently.
        segments, products = lay_out(
            segments, counts_L, method, rows_RD, experts_RK.numel(), by_load=self.compute == "auto"
        )
        counts: list[int] = counts_L.tolist()
        sizes = sizes_of(products, counts)
        ends = list(accumulate(sizes))
        weights_N1 = segments.weights_of(arrived.weights_RK).to(rows_RD.dtype).unsqueeze(1)
        y_ND = rows_RD.new_empty(segments.num_rows, rows_RD.shape[1])
        for place, tensors in self.cache.visit(counts):
            rows = slice(ends[place] - sizes[place], ends[place])
            x_MD = rows_RD.index_select(0, segments.rows.tokens_N[rows])
            one = alone(products, counts_L[place : place + 1], sizes[place])
            apply_expert(x_MD, weights_N1[rows], tensors, self.activation, one, y_ND[rows])
        return add_up(y_ND, segments.rows)


def sizes_of(products: Products, counts: Sequence[int]) -> list[int]:
    """Return the rows of each expert as a method lays them out."""
    if isinstance(products, LoopProducts):
        return list(products.sizes)
    return [products.size] * products.num_experts if isinstance(products, BatchedProducts) else list(counts)


def alone(products: Products, counts_1: Tensor, size: int) -> Products:
    """Return the same method for one expert.

    Args:
        products: for all of them.
        counts_1: [1] int64, the expert's rows.
        size: its rows as they are laid out.
    """
    if isinstance(products, BatchedProducts):
        return BatchedProducts(1, size, size)
    return GroupedProducts(counts_1, size) if isinstance(products, GroupedProducts) else LoopProducts([size], size)


def apply_expert(
    x_MD: Tensor,
    weights_M1: Tensor,
    tensors: Sequence[Tensor],
    activation: Activation,
    products: Products,
    out_MD: Tensor,
) -> None:
    """Write weight · down(activation(up(x))) of one expert: the forward pass of `ops.expert_ffn` for its rows.

    Args:
        x_MD: [M, D] rows.
        weights_M1: [M, 1] of the same dtype.
        tensors: [D, F'], [F, D], and the biases [F'], [D], if there are any, of the same dtype.
        activation: which.
        products: for this expert alone.
        out_MD: [M, D] place of the result.
    """
    up_1DF, down_1FD, *biases = (tensor.unsqueeze(0) for tensor in tensors)
    block = Block(slice(0, 1), slice(0, len(x_MD)), (len(x_MD),))
    inner_MF = products.times(x_MD, up_1DF, block)
    if biases:
        # A bias is a matrix of one row, met by a one, or in the second product by the weight.
        inner_MF.add_(products.times(torch.ones_like(weights_M1), biases[0].unsqueeze(1), block))
    products.times(weighted_hidden(inner_MF, weights_M1, activation), down_1FD, block, out_MD)
    if biases:
        out_MD.add_(products.times(weights_M1, biases[1].unsqueeze(1), block))
