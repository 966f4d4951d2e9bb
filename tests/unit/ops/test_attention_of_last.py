"""Attention of the last positions alone, as a text is continued: what attention of all positions gives these."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_train.ops import attention_products
from moe_train.ops.attention import causal_attention, causal_attention_reference, window_mask

QUICK = settings(max_examples=60, deadline=None)
WAYS = ("auto", "fused", "products")


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@QUICK
@given(st.data())
def test_the_last_queries_alone_see_what_they_see_among_all(data: st.DataObject) -> None:
    """In values and gradients, by every way, the reference's own included."""
    batch, kv_heads, shared, positions = (data.draw(st.integers(1, high)) for high in (3, 3, 3, 9))
    num = data.draw(st.integers(1, positions))
    widths = data.draw(st.sampled_from([(4, 4), (3, 5)]))
    kind: dict[str, Any] = {"scale": data.draw(st.one_of(st.none(), st.floats(0.05, 3.0)))}
    kind["window"] = data.draw(st.one_of(st.none(), st.integers(1, positions + 2)))
    heads = kv_heads * shared
    q, k = random(batch, heads, positions, widths[0], seed=0), random(batch, kv_heads, positions, widths[0], seed=1)
    leaves = [q, k, random(batch, kv_heads, positions, widths[1], seed=2)]
    sinks_H = random(heads, seed=3) if data.draw(st.booleans()) else None
    wanted = leaves if sinks_H is None else [*leaves, sinks_H]
    upstream = random(batch, heads, num, widths[1], seed=4).detach()
    expected_BHSU = causal_attention_reference(*leaves, sinks_H=sinks_H, **kind)[:, :, positions - num :]
    expected = [expected_BHSU, *torch.autograd.grad(expected_BHSU, wanted, upstream)]
    last = (q[:, :, positions - num :], *leaves[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_products, "BLOCK", data.draw(st.integers(1, num + 1)))
        results = [causal_attention(*last, sinks_H=sinks_H, compute=way, **kind) for way in WAYS]
        results.append(causal_attention_reference(*last, sinks_H=sinks_H, **kind))
        for y_BHSU in results:
            for a, b in zip([y_BHSU, *torch.autograd.grad(y_BHSU, wanted, upstream)], expected, strict=True):
                assert a.shape == b.shape
                assert torch.allclose(a, b, rtol=0, atol=1e-12)


@QUICK
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 25))
def test_the_mask_of_the_last_queries_is_the_lower_part_of_the_square(length: int, earlier: int, window: int) -> None:
    square = window_mask(earlier + length, window, torch.device("cpu"))
    assert torch.equal(window_mask(length, window, torch.device("cpu"), earlier), square[earlier:])


def test_more_queries_than_keys_are_refused() -> None:
    q, k = random(1, 2, 3, 4, seed=0), random(1, 2, 2, 4, seed=1)
    with pytest.raises(AssertionError, match="position of a key"):
        causal_attention(q, k, k)


class Largest(TorchDispatchMode):
    """Notes the most numbers that an operator newly wrote."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [] if func.is_view else [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *written, 0)
        return result


@pytest.mark.parametrize("kind", ["plain", "window", "sinks", "narrow values"])
def test_one_query_copies_no_keys(kind: str) -> None:
    """Nor has it shared ones repeated, nor masks made: the most that is written is a score per head and position."""
    batch, heads, kv_heads, positions, width = 1, 8, 2, 600, 32
    room = torch.randn(batch, kv_heads, 2 * positions, width)
    k_BGSW, v_BGSU = room[:, :, :positions], room[:, :, 1 : positions + 1]
    keys: dict[str, Any] = {"window": 500} if kind == "window" else {}
    keys |= {"sinks_H": torch.randn(heads)} if kind == "sinks" else {}
    v_BGSU = v_BGSU[..., : width // 2] if kind == "narrow values" else v_BGSU
    q_BHSW = torch.randn(batch, heads, 1, width)
    with torch.no_grad(), Largest() as largest:
        causal_attention(q_BHSW, k_BGSW, v_BGSU, **keys)
    assert 0 < largest.numel <= heads * (positions + 1) < k_BGSW.numel()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("width", [16, 12])
def test_one_query_in_bf16_has_scores_in_fp32(sinks: bool, width: int) -> None:
    """Scores of some tens, rounded to bf16, would be wrong by a tenth: and the shares by a tenth of themselves."""
    q, k, v = (random(1, n, m, w, seed=n).detach() for n, m, w in ((8, 1, 16), (2, 300, 16), (2, 300, width)))
    q, k, v = (6 * q).bfloat16(), k.bfloat16(), v.bfloat16()
    sinks_H = torch.linspace(-1.0, 20.0, 8) if sinks else None
    found = causal_attention(q, k, v, sinks_H=sinks_H)
    exact_H = None if sinks_H is None else sinks_H.double()
    expected = causal_attention_reference(q.double(), k.double(), v.double(), sinks_H=exact_H)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() <= 6e-3 * expected.norm()


def test_a_block_of_the_last_queries_meets_no_key_that_none_of_them_sees() -> None:
    assert attention_products.in_sight(0, 4, 10, 3) == (slice(0, 4), slice(8, 14))
    assert attention_products.in_sight(0, 4, 10, None) == (slice(0, 4), slice(0, 14))
