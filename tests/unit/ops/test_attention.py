"""Causal attention: who sees whom, shared key heads, windows, sinks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.ops.attention import causal_attention, causal_attention_reference

WIDTH, VALUE_WIDTH, LENGTH = 4, 3, 7
BOTH = pytest.mark.parametrize("attend", [causal_attention, causal_attention_reference])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0], dtype=torch.float64)},
    "sinks, window, scale": {"window": 2, "scale": 1.5, "sinks_H": torch.tensor([2.0, 0.1], dtype=torch.float64)},
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def heads(number: int, seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, LENGTH, width, dtype=torch.float64, generator=generator).requires_grad_()


def queries_keys_values(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Two query heads; values of another width than keys."""
    return heads(2, 0), heads(kv_heads, 1), heads(kv_heads, 2, VALUE_WIDTH)


def near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
def test_equals_the_reference(query_heads: int, kv_heads: int) -> None:
    q, k, v = heads(query_heads, 0), heads(kv_heads, 1), heads(kv_heads, 2)
    found, expected = causal_attention(q, k, v), causal_attention_reference(q, k, v)
    assert near(found, expected)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, [q, k, v], upstream) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert near(a, b)


@BOTH
@EACH_KIND
def test_a_position_sees_itself_and_the_window_before_it(attend: Callable[..., Tensor], kind: dict[str, Any]) -> None:
    """Exactly so many: neither later ones nor those out of sight, and all between."""
    q, k, v = queries_keys_values()
    window = kind.get("window", LENGTH)
    for i in range(LENGTH):
        seen = torch.zeros(LENGTH, dtype=torch.bool)
        seen[max(0, i + 1 - window) : i + 1] = True
        for gradient in torch.autograd.grad(attend(q, k, v, **kind)[:, :, i].square().sum(), [k, v]):
            sizes_S = gradient.abs().amax(dim=(0, 1, 3))
            if gradient.shape[-1] == WIDTH and seen.sum() == 1 and "sinks_H" not in kind:
                assert near(sizes_S, torch.zeros(LENGTH).double()), "the only key: its score is of no matter"
            else:
                assert torch.equal(sizes_S > 0, seen), f"position {i}"


@BOTH
def test_the_first_position_returns_its_own_value(attend: Callable[..., Tensor]) -> None:
    q, k, v = queries_keys_values()
    assert near(attend(q, k, v)[:, :, 0], v[:, :, 0], 1e-14)


@BOTH
def test_equal_scores_give_the_mean_of_what_is_seen(attend: Callable[..., Tensor]) -> None:
    """With a sink of the same score, one more share goes nowhere."""
    q, k, v = queries_keys_values()
    zero = torch.zeros_like(q)
    for sinks, sinks_H in ((0, None), (1, torch.zeros(2, dtype=torch.float64))):
        y_BHSU = attend(zero, k, v, window=3, sinks_H=sinks_H)
        for i in range(LENGTH):
            first = max(0, i - 2)
            expected = v[:, :, first : i + 1].sum(dim=2) / (i + 1 - first + sinks)
            assert near(y_BHSU[:, :, i], expected, 1e-14), f"position {i}"


@BOTH
def test_the_default_scale_is_that_of_the_queries(attend: Callable[..., Tensor]) -> None:
    q, k, v = queries_keys_values()
    assert near(attend(q, k, v), attend(q, k, v, scale=WIDTH**-0.5), 1e-14)
    assert near(attend(2 * q, k, v), attend(q, k, v, scale=2 * WIDTH**-0.5), 1e-12)


@BOTH
@pytest.mark.parametrize("window", [LENGTH, LENGTH + 1, 1000])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_window_as_long_as_the_text_is_none(attend: Callable[..., Tensor], window: int, sinks: bool) -> None:
    q, k, v = queries_keys_values()
    sinks_H = torch.tensor([1.0, -0.5], dtype=torch.float64) if sinks else None
    assert torch.equal(attend(q, k, v, window=window, sinks_H=sinks_H), attend(q, k, v, sinks_H=sinks_H))
    assert not near(attend(q, k, v, window=LENGTH - 1, sinks_H=sinks_H), attend(q, k, v, sinks_H=sinks_H), 1e-3)


@BOTH
@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_of_no_weight_changes_nothing(attend: Callable[..., Tensor], window: int | None) -> None:
    q, k, v = queries_keys_values()
    plain = attend(q, k, v, window=window)
    for score in (-1e4, float("-inf")):
        none = torch.full((2,), score, dtype=torch.float64)
        assert near(attend(q, k, v, window=window, sinks_H=none), plain, 1e-14)


@BOTH
@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_of_all_weight_leaves_nothing(attend: Callable[..., Tensor], window: int | None) -> None:
    """Each head has its own: the other still looks."""
    q, k, v = queries_keys_values()
    y_BHSU = attend(q, k, v, window=window, sinks_H=torch.tensor([1e4, -1e4], dtype=torch.float64))
    assert torch.equal(y_BHSU[:, 0], torch.zeros_like(y_BHSU[:, 0]))
    assert near(y_BHSU[:, 1], attend(q, k, v, window=window)[:, 1], 1e-14)


@BOTH
def test_a_sink_is_not_scaled(attend: Callable[..., Tensor]) -> None:
    """It stands beside the scaled scores: against one key of score zero it takes e^s / (e^s + 1)."""
    q, k, v = (t[:, :, :1] for t in queries_keys_values())
    for scale in (0.1, 1.0, 7.0):
        sinks_H = torch.tensor([0.7, -1.3], dtype=torch.float64)
        y_BHSU = attend(torch.zeros_like(q), k, v, scale=scale, sinks_H=sinks_H)
        expected = v / (1 + sinks_H.exp()).view(1, 2, 1, 1)
        assert near(y_BHSU, expected, 1e-13)


@EACH_KIND
def test_bf16_stays_finite_and_near(kind: dict[str, Any]) -> None:
    q, k, v = ((20 * t.detach()).bfloat16().requires_grad_() for t in queries_keys_values())
    found = causal_attention(q, k, v, **kind)
    expected = causal_attention_reference(q.double(), k.double(), v.double(), **kind)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    # Scores of some hundreds are rounded to about one: only where one key stands out is the result sure.
    assert (found.double() - expected).abs().median() <= 2.0**-7 * v.abs().max()
    for gradient in torch.autograd.grad(found.float().square().mean(), [q, k, v]):
        assert gradient.isfinite().all()


def test_the_gradient_of_fp32_sinks_is_fp32_under_bf16() -> None:
    """Sinks are master weights as all others."""
    q, k, v = (t.detach().bfloat16() for t in queries_keys_values())
    sinks_H = torch.tensor([0.5, -1.0]).requires_grad_()
    causal_attention(q, k, v, sinks_H=sinks_H).float().square().sum().backward()
    assert sinks_H.grad is not None
    assert sinks_H.grad.dtype == torch.float32
    exact_H = sinks_H.detach().double().requires_grad_()
    causal_attention_reference(q.double(), k.double(), v.double(), sinks_H=exact_H).square().sum().backward()
    assert torch.allclose(sinks_H.grad.double(), exact_H.grad, rtol=0.05)
