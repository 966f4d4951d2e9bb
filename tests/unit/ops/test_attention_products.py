"""Attention by products: equal to the loop for blocks of any size, and chosen where it was measured to be faster."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops import attention, attention_products
from moe_train.ops.attention import Compute, causal_attention, causal_attention_reference

QUICK = settings(max_examples=60, deadline=None)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@QUICK
@given(st.data())
def test_equals_the_reference_in_values_and_gradients(data: st.DataObject) -> None:
    batch, kv_heads, shared, length = (data.draw(st.integers(1, high)) for high in (3, 3, 3, 9))
    width, value_width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    kind: dict[str, Any] = {"scale": data.draw(st.one_of(st.none(), st.floats(0.05, 3.0)))}
    kind["window"] = data.draw(st.one_of(st.none(), st.integers(1, length + 2)))
    heads = kv_heads * shared
    leaves = [
        random(batch, length, heads, width, seed=0),  # as a projection leaves them: positions before heads
        random(batch, length, kv_heads, width, seed=1),
        random(batch, length, kv_heads, value_width, seed=2),
    ]
    sinks_H = random(heads, seed=3) if data.draw(st.booleans()) else None
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    leaves += [] if sinks_H is None else [sinks_H]
    upstream = random(batch, heads, length, value_width, seed=4).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_products, "BLOCK", data.draw(st.integers(1, length + 1)))
        y_BHSU = causal_attention(q, k, v, sinks_H=sinks_H, compute="products", **kind)
        found = [y_BHSU, *torch.autograd.grad(y_BHSU, leaves, upstream)]
    y_BHSU = causal_attention_reference(q, k, v, sinks_H=sinks_H, **kind)
    for a, b in zip(found, [y_BHSU, *torch.autograd.grad(y_BHSU, leaves, upstream)], strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("window", [None, 70])
def test_several_blocks_are_near_in_every_precision(dtype: torch.dtype, bound: float, window: int | None) -> None:
    """In the L2 norm, against fused attention of the same numbers in fp64; sinks and their gradient are fp32.

    In bf16 scores and shares are rounded; fused attention, which keeps scores in fp32, is at 3e-3.
    """
    shapes = [(2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 8), (4,)]
    leaves = [
        random(*shape, seed=seed).detach().to(dtype if len(shape) > 1 else torch.float32).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = random(2, 4, 300, 8, seed=4).detach()

    def pass_through(leaves: list[Tensor], compute: Compute) -> list[Tensor]:
        q, k, v, sinks_H = leaves
        y_BHSU = causal_attention(q, k, v, window=window, sinks_H=sinks_H, compute=compute)
        return [y_BHSU, *torch.autograd.grad(y_BHSU, [q, k, v, sinks_H], upstream.to(y_BHSU.dtype))]

    expected, found = pass_through(exact, "fused"), pass_through(leaves, "products")
    for a, b, leaf in zip(expected, found, [leaves[0], *leaves], strict=True):
        assert b.dtype == leaf.dtype
        assert (b.double() - a).norm() <= bound * a.norm()


@pytest.mark.parametrize(
    ("dtype", "length", "window", "is_chosen"),
    [
        (torch.bfloat16, 8, None, True),
        (torch.bfloat16, 1024, None, True),
        (torch.bfloat16, 1025, None, False),
        (torch.bfloat16, 1500, 1024, True),
        (torch.bfloat16, 1500, 1025, False),
        (torch.float32, 511, None, False),
        (torch.float32, 512, None, True),
        (torch.float32, 1025, None, False),
        (torch.float32, 1500, 100, True),
        (torch.float64, 600, 100, False),
    ],
)
def test_auto_chooses_by_dtype_and_length(
    dtype: torch.dtype, length: int, window: int | None, is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []

    def products(q_BHSW: Tensor, *_: Any) -> Tensor:
        calls.append(q_BHSW)
        return q_BHSW

    monkeypatch.setattr(attention, "attend_by_products", products)
    q_BHSW = torch.randn(1, 1, length, 2, dtype=dtype, requires_grad=True)
    numbers: dict[Compute, int] = {"fused": 0, "auto": int(is_chosen), "products": 1}
    for compute, number in numbers.items():
        calls.clear()
        causal_attention(q_BHSW, q_BHSW, q_BHSW, window=window, compute=compute)
        assert len(calls) == number, compute
    calls.clear()
    with torch.no_grad():  # nothing to keep: fused attention is the faster one
        causal_attention(q_BHSW, q_BHSW, q_BHSW, window=window)
    assert calls == []


def test_half_a_square_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block keeps the shares of what it sees: with blocks of 2, of 8 positions 2 + 4 + 6 + 8 times 2 values."""
    monkeypatch.setattr(attention_products, "BLOCK", 2)
    kept: list[int] = []

    def count(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    q, k, v = (random(1, 1, 8, 3, seed=seed) for seed in range(3))
    for window, shares in ((None, [4, 8, 12, 16]), (1, [4, 4, 4, 4])):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            causal_attention(q, k, v, compute="products", window=window)
        assert kept == [24, 24, 24, *shares]
