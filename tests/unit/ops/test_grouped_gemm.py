"""Products by expert: three ways against plain autograd, in blocks, also for experts without rows."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moe_train.ops.grouped_gemm import (
    BatchedProducts,
    Block,
    GroupedProducts,
    LoopProducts,
    Products,
    cut,
    grouped_gemm_reference,
)

COUNTS = {
    "even": [2, 2, 2],
    "an expert without rows": [3, 0, 3],
    "all rows with the first": [6, 0, 0],
    "all rows with the last": [0, 0, 6],
    "no rows at all": [0, 0, 0],
    "one expert": [6],
}
EACH_LOAD = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
BLOCK_ROWS = pytest.mark.parametrize("block_rows", [1, 4, 100])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let torch fill fresh memory with NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(counts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights, and gradients of the products."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), 4), (len(counts), 4, 5), (sum(counts), 5)]
    x_ND, w_LDF, g_NF = (torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return x_ND, w_LDF, g_NF


def assert_products(products: Products, counts: Sequence[int], dtype: torch.dtype = torch.float64) -> None:
    """With a place for the result and without; weights as they lie and transposed; the weights' gradient."""
    x_ND, w_LDF, g_NF = operands(counts, dtype)
    exact = [t.double().clone().requires_grad_() for t in (x_ND, w_LDF)]
    expected_NF = grouped_gemm_reference(*exact, torch.tensor(counts))
    dx_ND, dw_LDF = torch.autograd.grad(expected_NF, exact, g_NF.double(), materialize_grads=True, allow_unused=True)
    close = {"rtol": 0.0, "atol": 1e-13 if dtype == torch.float64 else 1e-5}
    placed_NF, outer_LDF = torch.empty_like(g_NF), torch.empty_like(w_LDF)
    for block in products.blocks():
        made_NF = products.times(x_ND[block.rows], w_LDF, block)
        products.times(x_ND[block.rows], w_LDF, block, placed_NF[block.rows])
        assert torch.allclose(made_NF.double(), expected_NF[block.rows], **close)
        back_ND = products.times(g_NF[block.rows], w_LDF.transpose(1, 2), block)
        assert torch.allclose(back_ND.double(), dx_ND[block.rows], **close)
        products.outer(x_ND[block.rows], g_NF[block.rows], block, outer_LDF)
    assert torch.allclose(placed_NF.double(), expected_NF, **close)
    assert torch.allclose(outer_LDF.double(), dw_LDF, **close)


@EACH_LOAD
@BLOCK_ROWS
def test_the_loop(counts: list[int], block_rows: int) -> None:
    assert_products(LoopProducts(counts, block_rows), counts)


@pytest.mark.parametrize("size", [0, 1, 3])
@BLOCK_ROWS
def test_the_batch(size: int, block_rows: int) -> None:
    assert_products(BatchedProducts(3, size, block_rows), [size] * 3)


@EACH_LOAD
def test_groups(counts: list[int]) -> None:
    """In fp32, the widest that torch's product takes, with widths that are no multiples of 16 bytes."""
    assert_products(GroupedProducts(torch.tensor(counts), sum(counts)), counts, torch.float32)


@pytest.mark.parametrize("kind", ["loop", "batch", "groups"])
def test_weights_kept_wider_than_rows(kind: str) -> None:
    """They are cast for the product, and their gradient has their dtype."""
    counts = [2, 2]
    products: dict[str, Products] = {
        "loop": LoopProducts(counts, 1),
        "batch": BatchedProducts(2, 2, 1),
        "groups": GroupedProducts(torch.tensor(counts), 4),
    }
    x_ND, w_LDF, g_NF = operands(counts, torch.bfloat16)
    wide_LDF, wide_out, narrow_out = w_LDF.float(), torch.empty(2, 4, 5), torch.empty(2, 4, 5, dtype=torch.bfloat16)
    for block in products[kind].blocks():
        made_NF = products[kind].times(x_ND[block.rows], wide_LDF, block)
        assert torch.equal(made_NF, products[kind].times(x_ND[block.rows], w_LDF, block))
        for out in (wide_out, narrow_out):
            products[kind].outer(x_ND[block.rows], g_NF[block.rows], block, out)
    assert torch.equal(wide_out, narrow_out.float())


def test_blocks_end_with_the_expert_that_fills_them() -> None:
    blocks = list(cut([3, 0, 2, 5, 0], block_rows=4))
    assert blocks == [
        Block(slice(0, 3), slice(0, 5), (3, 0, 2)),
        Block(slice(3, 4), slice(5, 10), (5,)),
        Block(slice(4, 5), slice(10, 10), (0,)),
    ]
