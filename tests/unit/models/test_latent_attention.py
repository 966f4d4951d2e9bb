"""Latent attention against a plain loop, and what it promises: a small cache, a shared key, published shapes."""

import itertools

import pytest
import torch
from attention_loops import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    YARN,
    attend,
    built,
    cached,
    latent_loop,
    latent_scale,
    model_of,
    near,
    query,
    table_of,
    up_rows,
)
from model_samples import random

from moe_train.config.attention import LatentConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import LATENT_EPS, LatentAttention, build_attention

LATENT = LatentConfig(kv_rank=5, nope_dim=3, rope_dim=4, v_dim=7)
LATENTS = {
    "direct queries": LATENT,
    "compressed queries": LATENT.model_copy(update={"q_rank": 8}),
    "YaRN": LATENT.model_copy(update={"yarn": YARN, "rope_theta": 50.0}),
    "compressed queries, YaRN": LATENT.model_copy(update={"q_rank": 8, "yarn": YARN, "rope_theta": 50.0}),
}
EACH_LATENT = pytest.mark.parametrize("section", LATENTS.values(), ids=LATENTS.keys())


def latent_of(section: LatentConfig) -> tuple[LatentAttention, ModelConfig]:
    config = model_of(section)
    attention = built(config)
    assert isinstance(attention, LatentAttention)
    return attention, config


@EACH_LATENT
def test_latent_attention_equals_a_plain_loop(section: LatentConfig) -> None:
    attention, config = latent_of(section)
    x_BSD = 0.3 * random(BATCH, LENGTH, DIM)
    expected_BSD = torch.stack([latent_loop(attention, config, x_SD) for x_SD in x_BSD])
    assert near(attention(x_BSD, table_of(config)), expected_BSD)


@EACH_LATENT
def test_latent_attention_has_the_gradients_of_a_plain_loop(section: LatentConfig) -> None:
    attention, config = latent_of(section)
    x_BSD, upstream = (0.3 * random(1, 4, DIM)).requires_grad_(), random(1, 4, DIM, seed=8)
    leaves = [x_BSD, *attention.parameters()]
    outputs = attention(x_BSD, table_of(config, 4)), latent_loop(attention, config, x_BSD[0]).unsqueeze(0)
    found, expected = (torch.autograd.grad(y_BSD, leaves, upstream) for y_BSD in outputs)
    for a, b in zip(found, expected, strict=True):
        assert near(a, b, 1e-11)
        assert b.abs().max() > 0


@EACH_LATENT
def test_a_cache_of_one_small_vector_per_token_is_enough(section: LatentConfig) -> None:
    """The claim of DeepSeek-V2, 2.1: with the up-projections absorbed, keys and values need never be formed."""
    attention, config = latent_of(section)
    x_SD = 0.3 * random(LENGTH, DIM)
    caches = [cached(attention, config, x_D, position) for position, x_D in enumerate(x_SD)]
    numbers = {cache.latent_N.numel() + cache.key_W.numel() for cache in caches}
    assert numbers == {section.kv_rank + section.rope_dim}, "whatever the number of heads"
    parts = []
    for head in range(config.heads):
        to_key, to_value = up_rows(attention, head)
        plain_W, turned_W = query(attention, config, x_SD[-1], LENGTH - 1, head)
        absorbed_N = torch.cat([to_key.t() @ plain_W, turned_W])
        keys = [torch.cat([cache.latent_N, cache.key_W]) for cache in caches]
        values = [cache.latent_N for cache in caches]
        parts.append(to_value @ attend(absorbed_N, keys, values, latent_scale(section)))
    expected_D = attention.out.weight @ torch.cat(parts)
    found_D = attention(x_SD.unsqueeze(0), table_of(config))[0, -1]
    assert near(found_D, expected_D)


def test_only_the_latent_part_is_normed() -> None:
    """What the shared key's weights are multiplied with, it is multiplied with; the latent part does not care."""
    attention, config = latent_of(LATENT)
    x_BSD, rotary = random(BATCH, LENGTH, DIM), table_of(config)
    keys, values = attention.keys_and_values(x_BSD, rotary)
    attention.kv_down.weight.data[LATENT.kv_rank :] *= 3
    larger, same_values = attention.keys_and_values(x_BSD, rotary)
    assert torch.allclose(larger[..., LATENT.nope_dim :], 3 * keys[..., LATENT.nope_dim :], rtol=1e-12)
    assert torch.equal(larger[..., : LATENT.nope_dim], keys[..., : LATENT.nope_dim])
    assert torch.equal(same_values, values)
    attention.kv_down.weight.data[: LATENT.kv_rank] *= 1000
    normed, normed_values = attention.keys_and_values(x_BSD, rotary)
    assert torch.allclose(normed, larger, rtol=0, atol=1e-4)
    assert torch.allclose(normed_values, values, rtol=0, atol=1e-4)


def test_all_heads_share_the_rotated_key_and_nothing_else() -> None:
    attention, config = latent_of(LATENT)
    keys, values = attention.keys_and_values(random(BATCH, LENGTH, DIM), table_of(config))
    assert values.shape == (BATCH, HEADS, LENGTH, LATENT.v_dim)
    for a, b in itertools.combinations(range(HEADS), 2):
        assert torch.equal(keys[:, a, :, LATENT.nope_dim :], keys[:, b, :, LATENT.nope_dim :])
        assert not torch.allclose(keys[:, a, :, : LATENT.nope_dim], keys[:, b, :, : LATENT.nope_dim])
        assert not torch.allclose(values[:, a], values[:, b])


def test_norms_of_latent_vectors_have_an_epsilon_of_their_own() -> None:
    """1e-6 whatever model.norm_eps says: so DeepSeek's published code."""
    attention, _ = latent_of(LATENTS["compressed queries"])
    assert attention.kv_norm.eps == attention.q_norm.eps == LATENT_EPS == 1e-6


def test_shapes_of_the_published_deepseek_v3() -> None:
    """Those of the tensors of its published checkpoint, and their sum of 187,107,328."""
    section = LatentConfig(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    with torch.device("meta"):
        attention = build_attention(ModelConfig(dim=7168, heads=128, attention=section), 0, 1.0)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "q_down.weight": (1536, 7168), "q_norm.weight": (1536,), "q_up.weight": (128 * 192, 1536),
        "kv_down.weight": (576, 7168), "kv_norm.weight": (512,), "kv_up.weight": (128 * 256, 512),
        "out.weight": (7168, 128 * 128),
    }  # fmt: skip
    assert sum(p.numel() for p in attention.parameters()) == 187_107_328


def test_shapes_without_compressed_queries() -> None:
    """Those of DeepSeek-V2-Lite."""
    with torch.device("meta"):
        attention = build_attention(ModelConfig(dim=2048, heads=16, attention=LatentConfig()), 0, 1.0)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "q.weight": (16 * 192, 2048), "kv_down.weight": (576, 2048), "kv_norm.weight": (512,),
        "kv_up.weight": (16 * 256, 512), "out.weight": (2048, 16 * 128),
    }  # fmt: skip


def test_the_output_projection_takes_the_values_of_all_heads() -> None:
    attention, _ = latent_of(LATENT)
    assert attention.out.weight.shape == (DIM, HEADS * LATENT.v_dim)
    assert HEADS * LATENT.v_dim != DIM


@EACH_LATENT
def test_no_position_sees_a_later_one(section: LatentConfig) -> None:
    attention, config = latent_of(section)
    x_BSD = random(1, LENGTH, DIM).requires_grad_()
    for i in range(LENGTH):
        (gradient,) = torch.autograd.grad(attention(x_BSD, table_of(config))[0, i].square().sum(), x_BSD)
        assert (gradient[0].abs().amax(dim=1) > 0).tolist() == [j <= i for j in range(LENGTH)]
