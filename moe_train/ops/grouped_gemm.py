"""One matrix product per expert, over rows that lie in segments: three ways to make it, without autograd.

A segment is the run of rows of one expert; segments lie in order of experts. `ops.expert_ffn` makes a whole network and
its gradients of these products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Block:
    """Experts that follow each other, and their rows: so few that what is made of them stays in the cache.

    Attributes:
        experts: a run of the L experts.
        rows: their rows among all N.
        sizes: rows of each; empty where only the device knows.
    """

    experts: slice
    rows: slice
    sizes: tuple[int, ...]


class Products(Protocol):
    """How the products of the rows of all experts are made. Weights may be kept in another dtype than that of rows."""

    def blocks(self) -> Sequence[Block]:
        """Return the blocks in order: all experts, all rows."""

    def times(self, x_ND: Tensor, w_LDF: Tensor, block: Block, out_NF: Tensor | None = None) -> Tensor:
        """Return x · w, expert by expert.

        Args:
            x_ND: [N, D] rows of the block.
            w_LDF: [L, D, F] weights of all experts, maybe a transposed view.
            block: whose rows these are.
            out_NF: [N, F] place for the result, of the rows' dtype; None: a new one.
        """

    def outer(self, x_ND: Tensor, g_NF: Tensor, block: Block, out_LDF: Tensor) -> None:
        """Write xᵀ · g of each of the block's experts to its place in [L, D, F]: zeros where there are no rows."""


@dataclass(frozen=True)
class LoopProducts:
    """One product after the other, each written to its place.

    The weights of an expert are cast just before their use, and its gradient just after: both are still in the cache.

    Attributes:
        sizes: rows of each expert.
        block_rows: a block ends with the expert that brings it to so many rows.
    """

    sizes: Sequence[int]
    block_rows: int

    def blocks(self) -> list[Block]:
        """Return the blocks."""
        return list(cut(self.sizes, self.block_rows))

    def times(self, x_ND: Tensor, w_LDF: Tensor, block: Block, out_NF: Tensor | None = None) -> Tensor:
        """Multiply expert by expert."""
        out_NF = x_ND.new_empty(len(x_ND), w_LDF.shape[2]) if out_NF is None else out_NF
        x_parts, out_parts = torch.split(x_ND, list(block.sizes)), torch.split(out_NF, list(block.sizes))
        for x_MD, w_DF, out_MF in zip(x_parts, w_LDF[block.experts], out_parts, strict=True):
            if len(x_MD):
                torch.mm(x_MD, w_DF.to(x_MD.dtype), out=out_MF)
        return out_NF

    def outer(self, x_ND: Tensor, g_NF: Tensor, block: Block, out_LDF: Tensor) -> None:
        """Multiply expert by expert."""
        x_parts, g_parts = torch.split(x_ND, list(block.sizes)), torch.split(g_NF, list(block.sizes))
        for x_MD, g_MF, out_DF in zip(x_parts, g_parts, out_LDF[block.experts], strict=True):
            if len(x_MD) == 0:
                out_DF.zero_()
            elif x_MD.dtype == out_DF.dtype:
                torch.mm(x_MD.t(), g_MF, out=out_DF)
            else:
                out_DF.copy_(x_MD.t() @ g_MF)


@dataclass(frozen=True)
class BatchedProducts:
    """One batched product: all segments have the size of the largest.

    Attributes:
        num_experts: L.
        size: rows of each.
        block_rows: as in `LoopProducts`.
    """

    num_experts: int
    size: int
    block_rows: int

    def blocks(self) -> list[Block]:
        """Return the blocks."""
        return list(cut([self.size] * self.num_experts, self.block_rows))

    def times(self, x_ND: Tensor, w_LDF: Tensor, block: Block, out_NF: Tensor | None = None) -> Tensor:
        """Multiply the block's experts at once."""
        out_NF = x_ND.new_empty(len(x_ND), w_LDF.shape[2]) if out_NF is None else out_NF
        w_LDF = w_LDF[block.experts].to(x_ND.dtype)
        torch.bmm(self._by_expert(x_ND, block), w_LDF, out=self._by_expert(out_NF, block))
        return out_NF

    def outer(self, x_ND: Tensor, g_NF: Tensor, block: Block, out_LDF: Tensor) -> None:
        """Multiply the block's experts at once."""
        x_LDM, g_LMF = self._by_expert(x_ND, block).transpose(1, 2), self._by_expert(g_NF, block)
        if x_ND.dtype == out_LDF.dtype:
            torch.bmm(x_LDM, g_LMF, out=out_LDF[block.experts])
        else:
            out_LDF[block.experts] = torch.bmm(x_LDM, g_LMF)

    def _by_expert(self, x_ND: Tensor, block: Block) -> Tensor:
        return x_ND.view(len(block.sizes), self.size, x_ND.shape[1])


@dataclass(frozen=True)
class GroupedProducts:
    """Torch's product for groups, whose sizes only the device knows: nothing is padded, nobody waits.

    Attributes:
        counts_L: [L] int64, rows of each expert.
        num_rows: their sum N.
    """

    counts_L: Tensor
    num_rows: int

    def blocks(self) -> list[Block]:
        """Return one block."""
        return [Block(slice(0, len(self.counts_L)), slice(0, self.num_rows), ())]

    def times(self, x_ND: Tensor, w_LDF: Tensor, block: Block, out_NF: Tensor | None = None) -> Tensor:
        """Multiply all at once."""
        if self.num_rows == 0:
            return x_ND.new_empty(0, w_LDF.shape[2])
        made_NF = F.grouped_mm(_aligned(x_ND), _aligned(w_LDF.to(x_ND.dtype), rows=True), offs=self._ends())
        made_NF = made_NF[:, : w_LDF.shape[2]]
        return made_NF if out_NF is None else out_NF.copy_(made_NF)

    def outer(self, x_ND: Tensor, g_NF: Tensor, block: Block, out_LDF: Tensor) -> None:
        """Multiply all at once."""
        if self.num_rows == 0:
            out_LDF.zero_()
            return
        made_LDF = F.grouped_mm(_aligned(x_ND).t(), _aligned(g_NF), offs=self._ends())
        # What torch makes of a group without rows is not said anywhere.
        made_LDF.masked_fill_((self.counts_L == 0).view(-1, 1, 1), 0)
        out_LDF.copy_(made_LDF[:, : out_LDF.shape[1], : out_LDF.shape[2]])

    def _ends(self) -> Tensor:
        return torch.cumsum(self.counts_L, dim=0).to(torch.int32)


def _aligned(x: Tensor, rows: bool = False) -> Tensor:
    """Return a matrix whose columns (and rows) are filled up with zeros to 16 bytes, as the grouped product demands."""
    step = 16 // x.element_size()
    missing = (-x.shape[-1] % step, -x.shape[-2] % step if rows else 0)
    return F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x


def cut(sizes: Sequence[int], block_rows: int) -> Iterator[Block]:
    """Yield the blocks of segments of these sizes, each as soon as it has ``block_rows`` rows."""
    first, start, rows = 0, 0, 0
    for expert, size in enumerate(sizes):
        rows += size
        if rows >= block_rows or expert == len(sizes) - 1:
            yield Block(slice(first, expert + 1), slice(start, start + rows), tuple(sizes[first : expert + 1]))
            first, start, rows = expert + 1, start + rows, 0


def grouped_gemm_reference(x_ND: Tensor, w_LDF: Tensor, counts_L: Tensor) -> Tensor:
    """Do what `Products.times` does for all experts, by plain autograd."""
    parts = torch.split(x_ND, counts_L.tolist())
    return torch.cat([x_MD @ w_DF for x_MD, w_DF in zip(parts, w_LDF.unbind(), strict=True)])
