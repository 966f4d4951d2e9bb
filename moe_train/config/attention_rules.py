"""Rules of attention: heads, positions and, where it has some, experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from moe_train.config.attention import GroupedQueryConfig, LatentConfig, RotaryConfig, SwitchHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.errors import Problem


def attention_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of attention, and between them and the model."""
    attention = model.attention
    match attention:
        case GroupedQueryConfig():
            yield from width_problems(model, attention)
            yield from grouped_query_problems(model, attention)
            yield from scale_problems(attention)
        case LatentConfig():
            yield from latent_problems(attention)
        case SwitchHeadConfig():
            yield from width_problems(model, attention)
            yield from switchhead_problems(model, attention)
            yield from scale_problems(attention)
        case _:
            assert_never(attention)
    yield from stretching_problems(attention)
    yield from position_problems(model)


def position_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with how positions enter."""
    attention, longest = model.attention, model.max_positions
    if model.positions == "rotary":
        if longest is not None:
            rule = "is the number of learned positions, and positions are rotary"
            yield Problem("model.max_positions", longest, rule, "set model.positions=learned or leave it out")
        return
    if longest is None:
        rule = "learned positions need a longest text"
        yield Problem("model.max_positions", None, rule, "set it to data.seq_len or more")
    if isinstance(attention, LatentConfig):
        rule = "latent attention has rotary positions"
        yield Problem("model.positions", model.positions, rule, "leave it out, or choose model/attention=gqa")
    for key in ("yarn", "llama3"):
        if getattr(attention, key) is not None:
            rule = "stretches rotary positions, and positions are learned"
            yield Problem(f"model.attention.{key}", "set", rule, "leave it out, or set model.positions=rotary")


def stretching_problems(rotary: RotaryConfig) -> Iterator[Problem]:
    """Yield what is wrong with how rotary positions are stretched to longer texts."""
    yarn, llama3 = rotary.yarn, rotary.llama3
    if yarn is not None and llama3 is not None:
        yield Problem("model.attention.llama3", None, "positions are stretched by yarn already", "leave one out")
    if yarn is not None and yarn.beta_fast <= yarn.beta_slow:
        yield Problem(
            "model.attention.yarn.beta_fast",
            yarn.beta_fast,
            f"must exceed beta_slow={yarn.beta_slow}: between them frequencies are blended",
            "raise it, or lower beta_slow",
        )
    if llama3 is not None and llama3.high_freq_factor <= llama3.low_freq_factor:
        yield Problem(
            "model.attention.llama3.high_freq_factor",
            llama3.high_freq_factor,
            f"must exceed low_freq_factor={llama3.low_freq_factor}: between them frequencies are blended",
            "raise it, or lower low_freq_factor",
        )


def scale_problems(rotary: RotaryConfig) -> Iterator[Problem]:
    """Yield that a scale of scores stands where only latent attention has one."""
    if rotary.yarn is not None and rotary.yarn.mscale_all_dim:
        yield Problem(
            "model.attention.yarn.mscale_all_dim",
            rotary.yarn.mscale_all_dim,
            "scales the scores of latent attention only",
            "leave it out, or choose model/attention=mla",
        )


def width_problems(model: ModelConfig, attention: GroupedQueryConfig | SwitchHeadConfig) -> Iterator[Problem]:
    """Yield what is wrong with the width of a head."""
    width = attention.head_dim or model.dim // model.heads
    if attention.head_dim is None and model.dim % model.heads:
        yield Problem(
            "model.heads",
            model.heads,
            f"must divide model.dim={model.dim}",
            "change one of them, or set model.attention.head_dim",
        )
    elif width % 2:
        key, value = ("model.heads", model.heads) if attention.head_dim is None else ("model.attention.head_dim", width)
        yield Problem(
            key,
            value,
            f"rotary positions need an even head width, not {width}",
            "change model.dim, model.heads or model.attention.head_dim",
        )


def latent_problems(attention: LatentConfig) -> Iterator[Problem]:
    """Yield what is wrong with the widths of latent attention."""
    if attention.rope_dim % 2:
        yield Problem(
            "model.attention.rope_dim",
            attention.rope_dim,
            "rotary positions turn pairs: must be even",
            "choose another",
        )


def grouped_query_problems(model: ModelConfig, attention: GroupedQueryConfig) -> Iterator[Problem]:
    """Yield what is wrong between the heads of grouped-query attention."""
    if attention.kv_heads is not None and model.heads % attention.kv_heads:
        yield Problem(
            "model.attention.kv_heads",
            attention.kv_heads,
            f"must divide model.heads={model.heads}",
            "change one of them",
        )
    if attention.full_every is not None and attention.window is None:
        yield Problem(
            "model.attention.full_every",
            attention.full_every,
            "says which layers have no window, and there is none",
            "set model.attention.window, or leave it out",
        )


def switchhead_problems(model: ModelConfig, attention: SwitchHeadConfig) -> Iterator[Problem]:
    """Yield what is wrong with the experts of heads."""
    if attention.top_k > attention.experts:
        yield Problem(
            "model.attention.top_k",
            attention.top_k,
            f"must not exceed model.attention.experts={attention.experts}: those of one head",
            "lower it, or raise model.attention.experts",
        )
    graph = model.ffn.graph
    if graph is not None and graph.expert == "block":
        rule = "has experts, and so would each of the blocks that model.ffn.graph.expert=block couples"
        yield Problem("model.attention.kind", "switchhead", rule, "choose model/attention=gqa")


def has_head_experts(model: ModelConfig) -> bool:
    """Return whether attention has experts."""
    return isinstance(model.attention, SwitchHeadConfig)


def head_layout_problems(ep: int, model: ModelConfig) -> Iterator[Problem]:
    """Yield that the experts of all heads do not divide over the ranks of an expert-parallel group."""
    attention = model.attention
    if isinstance(attention, SwitchHeadConfig) and (model.heads * attention.experts) % ep:
        rule = f"must divide model.heads x model.attention.experts = {model.heads} x {attention.experts}"
        yield Problem("parallel.ep", ep, rule, "change one of them")
