"""RMSNorm with its own backward pass, against the formula row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moe_train.ops.norm import rms_norm, rms_norm_reference

QUICK = settings(max_examples=40, deadline=None)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9), st.sampled_from([1e-6, 1e-2]))
def test_equals_the_reference_in_values_and_gradients(rows: list[int], width: int, eps: float) -> None:
    leaves = [random(*rows, width, seed=0).requires_grad_(), random(width, seed=1).requires_grad_()]
    upstream = random(*rows, width, seed=2)
    results = []
    for norm in (rms_norm, rms_norm_reference):
        y = norm(leaves[0], leaves[1], eps)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_do_not_lie_together() -> None:
    """As queries after their projection: cut and turned."""
    x = random(2, 3, 4, 5, seed=0).transpose(1, 2).requires_grad_()
    weight_D = random(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight_D: rms_norm(x, weight_D, 1e-5), [x, weight_D])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_computed_in_fp32(weight_dtype: torch.dtype) -> None:
    x = random(64, 32, seed=0).bfloat16().requires_grad_()
    weight_D = random(32, seed=1).to(weight_dtype).requires_grad_()
    y, expected = rms_norm(x, weight_D, 1e-5), F.rms_norm(x.double(), (32,), weight_D.double(), 1e-5)
    assert torch.allclose(y.double(), expected, rtol=2.0**-8, atol=1e-6)
    found = torch.autograd.grad(y, [x, weight_D], torch.ones_like(y))
    for a, b, leaf in zip(found, torch.autograd.grad(expected.sum(), [x, weight_D]), [x, weight_D], strict=True):
        assert a.dtype == leaf.dtype
        assert torch.allclose(a.double(), b.double(), rtol=2.0**-7, atol=2.0**-7)


def test_one_number_per_row_is_kept_beside_the_input() -> None:
    kept: list[int] = []

    def count(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        rms_norm(torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True), torch.ones(5, requires_grad=True), 1e-5)
    assert sorted(kept) == [5, 6, 30]
