"""What must hold of attention for every shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops.attention import causal_attention, causal_attention_reference, window_mask

QUICK = settings(max_examples=60, deadline=None)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@QUICK
@given(st.data())
def test_fused_equals_the_reference_in_values_and_gradients(data: st.DataObject) -> None:
    batch, kv_heads, shared, length = (data.draw(st.integers(1, high)) for high in (3, 3, 3, 9))
    width, value_width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    scale = data.draw(st.one_of(st.none(), st.floats(0.05, 3.0)))
    window = data.draw(st.one_of(st.none(), st.integers(1, length + 2)))
    heads = kv_heads * shared
    leaves = [
        random(batch, heads, length, width, seed=0),
        random(batch, kv_heads, length, width, seed=1),
        random(batch, kv_heads, length, value_width, seed=2),
    ]
    sinks_H = random(heads, seed=3) if data.draw(st.booleans()) else None
    leaves += [] if sinks_H is None else [sinks_H]
    upstream = random(batch, heads, length, value_width, seed=4).detach()
    results = []
    for attend in (causal_attention, causal_attention_reference):
        y_BHSU = attend(*leaves[:3], scale=scale, window=window, sinks_H=sinks_H)
        results.append([y_BHSU, *torch.autograd.grad(y_BHSU, leaves, upstream)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@QUICK
@given(st.integers(1, 20), st.integers(1, 25))
def test_a_window_holds_so_many_positions(length: int, window: int) -> None:
    seen_SS = window_mask(length, window, torch.device("cpu"))
    assert seen_SS.tolist() == [[i - window < j <= i for j in range(length)] for i in range(length)]
    assert seen_SS.sum(dim=1).tolist() == [min(i + 1, window) for i in range(length)]
