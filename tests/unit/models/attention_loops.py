"""Both kinds of attention as plain loops over tokens and heads, and small ones to compare with them."""

from __future__ import annotations

import dataclasses
import math

import torch
from model_samples import filled
from torch import Tensor

from moe_train.config.attention import GroupedQueryConfig, LatentConfig, YarnConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import (
    LATENT_EPS,
    GroupedQueryAttention,
    LatentAttention,
    build_attention,
    rotary_width,
)
from moe_train.moe.modules import RMSNorm
from moe_train.ops.rotary import Rotary, frequencies, rotary_table

BATCH, LENGTH, DIM, HEADS = 2, 6, 12, 4
CPU = torch.device("cpu")
YARN = YarnConfig(factor=8.0, original_length=64, mscale=0.9, mscale_all_dim=0.6)


def near(found: Tensor, expected: Tensor, accuracy: float = 1e-12) -> bool:
    """Whether they are equal up to this, relative to the largest."""
    return torch.allclose(found, expected, rtol=0, atol=accuracy * expected.detach().abs().max().item())


def model_of(attention: GroupedQueryConfig | LatentConfig, heads: int = HEADS, eps: float = 1e-2) -> ModelConfig:
    return ModelConfig(dim=DIM, heads=heads, norm_eps=eps, attention=attention)


def built(config: ModelConfig, layer: int = 0) -> GroupedQueryAttention | LatentAttention:
    return filled(build_attention(config, layer, 1.0).double())


def table_of(config: ModelConfig, length: int = LENGTH) -> Rotary:
    return rotary_table(length, rotary_width(config), config.attention, torch.float64, CPU)


def turn(x_W: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Rotate the pairs (i, i + W/2) of one vector, with YaRN's magnitude."""
    yarn, half = config.attention.yarn, len(x_W) // 2
    size = 1.0
    if yarn is not None:
        size = (0.1 * yarn.mscale * math.log(yarn.factor) + 1) / (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1)
    turned = torch.empty_like(x_W)
    for i, frequency in enumerate(frequencies(len(x_W), config.attention, CPU).tolist()):
        cos, sin = size * math.cos(position * frequency), size * math.sin(position * frequency)
        turned[i] = cos * x_W[i] - sin * x_W[i + half]
        turned[i + half] = sin * x_W[i] + cos * x_W[i + half]
    return turned


def rms(x_N: Tensor, norm: RMSNorm | None, eps: float) -> Tensor:
    return x_N if norm is None else x_N / (x_N.square().mean() + eps).sqrt() * norm.weight


def attend(q_W: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, sink: Tensor | None = None) -> Tensor:
    """One query over what it sees."""
    exponentials = [torch.exp(scale * (q_W @ k_W)) for k_W in keys]
    total = torch.stack(exponentials).sum() + (0.0 if sink is None else sink.exp())
    return torch.stack([e / total * v_U for e, v_U in zip(exponentials, values, strict=True)]).sum(dim=0)


def grouped_query_loop(attention: GroupedQueryAttention, config: ModelConfig, x_SD: Tensor) -> Tensor:
    """Grouped-query attention of one sequence."""
    section = config.attention
    assert isinstance(section, GroupedQueryConfig)
    groups, width = section.kv_heads or config.heads, attention.width
    sizes = [config.heads * width, groups * width, groups * width]
    queries, keys, values = [], [], []
    for position, x_D in enumerate(x_SD):
        row = attention.qkv.weight @ x_D
        q_N, k_N, v_N = (row if attention.qkv.bias is None else row + attention.qkv.bias).split(sizes)
        if section.qk_norm == "full":
            q_N, k_N = rms(q_N, attention.q_norm, config.norm_eps), rms(k_N, attention.k_norm, config.norm_eps)
        q_heads, k_heads = list(q_N.split(width)), list(k_N.split(width))
        if section.qk_norm == "head":
            q_heads = [rms(q_W, attention.q_norm, config.norm_eps) for q_W in q_heads]
            k_heads = [rms(k_W, attention.k_norm, config.norm_eps) for k_W in k_heads]
        queries.append([turn(q_W, position, config) for q_W in q_heads])
        keys.append([turn(k_W, position, config) for k_W in k_heads])
        values.append(list(v_N.split(width)))
    rows = []
    for i in range(len(x_SD)):
        seen = range(0 if attention.window is None else max(0, i - attention.window + 1), i + 1)
        parts = []
        for head in range(config.heads):
            g = head // (config.heads // groups)
            sink = None if attention.sinks_H is None else attention.sinks_H[head]
            seen_keys, seen_values = [keys[j][g] for j in seen], [values[j][g] for j in seen]
            parts.append(attend(queries[i][head], seen_keys, seen_values, width**-0.5, sink))
        y_D = attention.out.weight @ torch.cat(parts)
        rows.append(y_D if attention.out.bias is None else y_D + attention.out.bias)
    return torch.stack(rows)


def latent_scale(section: LatentConfig) -> float:
    """1 / sqrt(nope + rope), times the square of YaRN's magnitude of scores."""
    yarn = section.yarn
    size = 1.0 if yarn is None else 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return size**2 / math.sqrt(section.nope_dim + section.rope_dim)


@dataclasses.dataclass(frozen=True)
class Cache:
    """All that is kept of a token: its compressed keys and values, normed, and the shared key, rotated."""

    latent_N: Tensor
    key_W: Tensor


def cached(attention: LatentAttention, config: ModelConfig, x_D: Tensor, position: int) -> Cache:
    section = attention.sizes
    latent_N, key_W = (attention.kv_down.weight @ x_D).split([section.kv_rank, section.rope_dim])
    return Cache(rms(latent_N, attention.kv_norm, LATENT_EPS), turn(key_W, position, config))


def query(attention: LatentAttention, config: ModelConfig, x_D: Tensor, position: int, head: int) -> tuple[Tensor, ...]:
    """The two parts of one head's query."""
    section = attention.sizes
    if section.q_rank is None:
        q_N = attention.q.weight @ x_D
    else:
        q_N = attention.q_up.weight @ rms(attention.q_down.weight @ x_D, attention.q_norm, LATENT_EPS)
    width = section.nope_dim + section.rope_dim
    plain_W, turned_W = q_N[head * width : (head + 1) * width].split([section.nope_dim, section.rope_dim])
    return plain_W, turn(turned_W, position, config)


def up_rows(attention: LatentAttention, head: int) -> tuple[Tensor, ...]:
    """The matrices from the latent vector to one head's key part and value."""
    section = attention.sizes
    rows = section.nope_dim + section.v_dim
    return attention.kv_up.weight[head * rows : (head + 1) * rows].split([section.nope_dim, section.v_dim])


def latent_loop(attention: LatentAttention, config: ModelConfig, x_SD: Tensor) -> Tensor:
    """Latent attention of one sequence (DeepSeek-V2, eq. 37 to 47)."""
    caches = [cached(attention, config, x_D, position) for position, x_D in enumerate(x_SD)]
    rows = []
    for i, x_D in enumerate(x_SD):
        parts = []
        for head in range(config.heads):
            to_key, to_value = up_rows(attention, head)
            keys = [torch.cat([to_key @ cache.latent_N, cache.key_W]) for cache in caches[: i + 1]]
            values = [to_value @ cache.latent_N for cache in caches[: i + 1]]
            q_W = torch.cat(query(attention, config, x_D, i, head))
            parts.append(attend(q_W, keys, values, latent_scale(attention.sizes)))
        rows.append(attention.out.weight @ torch.cat(parts))
    return torch.stack(rows)
