"""Grouped matrix product: forward and gradients equal plain autograd, also for experts without rows."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moe_train.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference

COUNTS = {
    "even": [2, 2, 2],
    "an expert without rows": [3, 0, 3],
    "all rows with the first": [6, 0, 0],
    "all rows with the last": [0, 0, 6],
    "no rows at all": [0, 0, 0],
    "one expert": [6],
}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let torch fill fresh memory with NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(sum(counts), 4, dtype=torch.float64, generator=generator)
    w_LDF = torch.randn(len(counts), 4, 5, dtype=torch.float64, generator=generator)
    return x_ND.requires_grad_(), w_LDF.requires_grad_(), torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_reference(counts: list[int]) -> None:
    x_ND, w_LDF, counts_L = operands(counts)
    expected_NF = grouped_gemm_reference(x_ND, w_LDF, counts_L)
    found_NF = grouped_gemm(x_ND, w_LDF, counts_L)
    assert torch.allclose(found_NF, expected_NF, rtol=0, atol=1e-13)
    upstream_NF = torch.randn_like(expected_NF)
    expected = torch.autograd.grad(expected_NF, [x_ND, w_LDF], upstream_NF, materialize_grads=True)
    found = torch.autograd.grad(found_NF, [x_ND, w_LDF], upstream_NF)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_gradcheck(counts: list[int]) -> None:
    x_ND, w_LDF, counts_L = operands(counts)
    assert gradcheck(lambda x, w: grouped_gemm(x, w, counts_L), (x_ND, w_LDF))


@pytest.mark.usefixtures("poisoned_memory")
def test_an_expert_without_rows_gets_zeros_not_none() -> None:
    x_ND, w_LDF, counts_L = operands([0, 4, 0])
    grouped_gemm(x_ND, w_LDF, counts_L).square().sum().backward()
    assert w_LDF.grad is not None
    assert torch.equal(w_LDF.grad[[0, 2]], torch.zeros(2, 4, 5, dtype=torch.float64))
    assert w_LDF.grad[1].abs().min() > 0


def test_a_stride_zero_gradient() -> None:
    """``y.sum().backward()`` hands down an expanded scalar, which torch's own grouped product refuses."""
    x_ND, w_LDF, counts_L = operands([2, 0, 3])
    grouped_gemm(x_ND, w_LDF, counts_L).sum().backward()
    assert x_ND.grad is not None
    assert torch.allclose(x_ND.grad[:2], w_LDF[0].sum(dim=1).detach().expand(2, 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    x_ND, w_LDF, counts_L = operands([2, 1, 3])
    exact_NF = grouped_gemm_reference(x_ND, w_LDF, counts_L)
    found_NF = grouped_gemm(x_ND.to(dtype), w_LDF.to(dtype), counts_L)
    assert found_NF.dtype == dtype
    assert torch.allclose(found_NF.double(), exact_NF, rtol=0, atol=8 * torch.finfo(dtype).eps * 4)
