"""Grouped-query attention against a plain loop: norms, biases, head widths, windows, sinks."""

import pytest
import torch
from attention_loops import BATCH, DIM, LENGTH, YARN, built, grouped_query_loop, model_of, near, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import random

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import GroupedQueryAttention, window_of


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_grouped_queries_equal_a_plain_loop(data: st.DataObject) -> None:
    section = GroupedQueryConfig(
        kv_heads=data.draw(st.sampled_from([None, 1, 2])),
        head_dim=data.draw(st.sampled_from([2, 4, 10])),
        qkv_bias=data.draw(st.booleans()),
        out_bias=data.draw(st.booleans()),
        qk_norm=data.draw(st.sampled_from(["none", "head", "full"])),
        window=data.draw(st.sampled_from([None, 1, 3, 9])),
        sinks=data.draw(st.booleans()),
        rope_theta=50.0,
        yarn=data.draw(st.sampled_from([None, YARN.model_copy(update={"mscale_all_dim": 0.0})])),
    )
    config = model_of(section)
    attention, x_BSD = built(config), random(BATCH, LENGTH, DIM)
    assert isinstance(attention, GroupedQueryAttention)
    expected_BSD = torch.stack([grouped_query_loop(attention, config, x_SD) for x_SD in x_BSD])
    assert near(attention(x_BSD, table_of(config)), expected_BSD)


def test_attention_at_one_position_is_its_value_projected() -> None:
    config = model_of(GroupedQueryConfig(kv_heads=2, head_dim=4))
    attention, x_BSD = built(config), random(2, 1, DIM)
    assert isinstance(attention, GroupedQueryAttention)
    values = x_BSD @ attention.qkv.weight[-2 * 4 :].t()
    shared = values.view(2, 1, 2, 4).repeat_interleave(2, dim=2).flatten(2)
    expected_BSD = shared @ attention.out.weight.t()
    assert torch.allclose(attention(x_BSD, table_of(config, 1)), expected_BSD, rtol=0, atol=1e-11)


@pytest.mark.parametrize("heads", [3, 4])
def test_the_width_of_a_head_is_its_own(heads: int) -> None:
    """Neither dim / heads, where it is stated, nor do the heads then have to divide the width."""
    attention = built(ModelConfig(dim=10, heads=heads, attention=GroupedQueryConfig(kv_heads=1, head_dim=6)))
    assert isinstance(attention, GroupedQueryAttention)
    assert attention.qkv.weight.shape == ((heads + 2) * 6, 10)
    assert attention.out.weight.shape == (10, heads * 6)
    plain = built(ModelConfig(dim=12, heads=3, attention=GroupedQueryConfig()))
    assert isinstance(plain, GroupedQueryAttention)
    assert plain.width == 4


@pytest.mark.parametrize(("kind", "q_width", "k_width"), [("head", 6, 6), ("full", 24, 12)])
def test_shapes_of_the_norms_of_queries_and_keys(kind: str, q_width: int, k_width: int) -> None:
    section = GroupedQueryConfig.model_validate({"kv_heads": 2, "head_dim": 6, "qk_norm": kind})
    attention = built(model_of(section))
    assert isinstance(attention, GroupedQueryAttention)
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    assert attention.q_norm.weight.shape == (q_width,)
    assert attention.k_norm.weight.shape == (k_width,)


def test_only_what_is_switched_on_has_parameters() -> None:
    names = {
        key: {name for name, _ in built(model_of(GroupedQueryConfig.model_validate(section))).named_parameters()}
        for key, section in {
            "none": {}, "qkv_bias": {"qkv_bias": True}, "out_bias": {"out_bias": True}, "sinks": {"sinks": True},
            "qk_norm": {"qk_norm": "head"},
        }.items()
    }  # fmt: skip
    plain = names.pop("none")
    assert plain == {"qkv.weight", "out.weight"}
    assert {key: found - plain for key, found in names.items()} == {
        "qkv_bias": {"qkv.bias"}, "out_bias": {"out.bias"}, "sinks": {"sinks_H"},
        "qk_norm": {"q_norm.weight", "k_norm.weight"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("window", "full_every", "expected"),
    [
        (None, None, [None, None, None, None]),
        (3, None, [3, 3, 3, 3]),
        (3, 2, [3, None, 3, None]),
        (3, 3, [3, 3, None, 3]),
        (3, 1, [None, None, None, None]),
    ],
)
def test_windows_by_layer(window: int | None, full_every: int | None, expected: list[int | None]) -> None:
    """The last of each n sees all (gpt-oss: layers 1, 3, ... from 0)."""
    section = GroupedQueryConfig(window=window, full_every=full_every)
    assert [window_of(section, layer) for layer in range(4)] == expected
    assert [built(model_of(section), layer).window for layer in range(4)] == expected


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_sees_as_far_as_its_window(layer: int) -> None:
    config = model_of(GroupedQueryConfig(window=2, full_every=2))
    x_BSD = random(1, LENGTH, DIM).requires_grad_()
    y_BSD = built(config, layer)(x_BSD, table_of(config))
    (gradient,) = torch.autograd.grad(y_BSD[0, -1].square().sum(), x_BSD)
    seen = (gradient[0].abs().amax(dim=1) > 0).tolist()
    assert seen == ([False] * 4 + [True] * 2 if layer == 0 else [True] * 6)
