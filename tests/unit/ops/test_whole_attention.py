"""Attention of whole texts: who sees whom, and that padding is nowhere."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops.attention import Compute, whole_attention, whole_attention_reference

WIDTH, VALUE_WIDTH = 4, 3
METHODS: tuple[Compute, ...] = ("auto", "fused", "products")
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


def heads(batch: int, number: int, length: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, number, length, width, dtype=torch.float64, generator=generator).requires_grad_()


def parts(batch: int, num_heads: int, groups: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values of another width."""
    q, k = heads(batch, num_heads, length, seed=1), heads(batch, groups, length, seed=2)
    return q, k, heads(batch, groups, length, VALUE_WIDTH, seed=3)


def prefixes(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths).unsqueeze(1)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Which positions hold tokens, in any places, in some rows but the first nowhere; query and key heads."""
    length, batch = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    rows[0][0] = True
    groups = draw(st.integers(1, 2))
    return torch.tensor(rows), groups * draw(st.integers(1, 3)), groups


@settings(max_examples=40, deadline=None)
@given(texts(), st.sampled_from(METHODS), st.sampled_from([None, 0.3]))
def test_equals_the_reference_where_there_are_tokens(
    drawn: tuple[Tensor, int, int], method: Compute, scale: float | None
) -> None:
    valid_BS, num_heads, groups = drawn
    leaves = parts(len(valid_BS), num_heads, groups, valid_BS.shape[1])
    found, expected = (
        attend(*leaves, valid_BS, scale, method)[valid_BS.unsqueeze(1).expand(-1, num_heads, -1)]
        for attend in (whole_attention, whole_attention_reference)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients: list[Any] = [
        torch.autograd.grad(y, leaves, upstream, allow_unused=True, materialize_grads=True) for y in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.sampled_from(METHODS))
def test_what_stands_at_padding_never_matters(lengths: list[int], method: Compute) -> None:
    valid_BS = prefixes(lengths, 6)
    q, k, v = (t.detach() for t in parts(len(lengths), 2, 2, 6))
    seen = valid_BS.unsqueeze(1).expand(-1, 2, -1)
    before = whole_attention(q, k, v, valid_BS, compute=method)[seen]
    padding = ~valid_BS[:, None, :, None]
    changed = (t.masked_fill(padding, 1e3) for t in (q, k, v))
    assert torch.equal(whole_attention(*changed, valid_BS, compute=method)[seen], before)


@EACH_METHOD
def test_a_text_among_longer_ones_is_the_text_alone(method: Compute) -> None:
    lengths = [5, 2, 1]
    q, k, v = parts(3, 4, 2, 5)
    together = whole_attention(q, k, v, prefixes(lengths, 5), compute=method)
    for text, n in enumerate(lengths):
        alone = whole_attention(*(t[text : text + 1, :, :n] for t in (q, k, v)), compute=method)
        torch.testing.assert_close(together[text : text + 1, :, :n], alone, rtol=0, atol=1e-13)


@EACH_METHOD
def test_every_token_sees_later_ones_too(method: Compute) -> None:
    q, k, v = parts(1, 1, 1, 4)
    for i in range(4):
        (dv,) = torch.autograd.grad(whole_attention(q, k, v, compute=method)[:, :, i].sum(), v)
        assert (dv.abs().amax(dim=(0, 1, 3)) > 0).all()


@EACH_METHOD
def test_rows_without_a_token_are_finite_and_so_are_their_gradients(method: Compute) -> None:
    leaves = parts(2, 2, 1, 3)
    y = whole_attention(*leaves, prefixes([0, 2], 3), compute=method)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


def test_order_does_not_matter() -> None:
    """Without positions a text is a set."""
    q, k, v = parts(1, 2, 2, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = whole_attention(*(t[:, :, order] for t in (q, k, v)))
    torch.testing.assert_close(mixed, whole_attention(q, k, v)[:, :, order], rtol=0, atol=1e-13)
