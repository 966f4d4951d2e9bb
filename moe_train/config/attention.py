"""The keys of attention: how positions enter, what the heads are, what they see."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moe_train.config.base import Fraction, Strict


class YarnConfig(Strict):
    """YaRN: rotary positions stretched to texts longer than the model was trained on (arXiv 2309.00071, section 3).

    The magnitudes follow DeepSeek's published code: with m(a) = 0.1 · a · ln(factor) + 1, rotated queries and keys are
    multiplied by m(mscale) / m(mscale_all_dim), and the scores of latent attention by m(mscale_all_dim)².
    """

    factor: Annotated[float, Field(gt=1.0)] = 40.0
    """How many times longer texts become."""
    original_length: PositiveInt = 4096
    """Longest text before stretching, in tokens."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies that turn more often than this over the original length stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies that turn less often than this are divided by the factor; those between are blended."""
    truncate: bool = True
    """Whether the bounds of the blend are rounded outwards to whole frequencies (gpt-oss does not)."""
    mscale: NonNegativeFloat = 1.0
    """a in the magnitude of rotated queries and keys."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """a in the magnitude of all scores (latent attention only)."""


class Llama3Config(Strict):
    """Rotary positions stretched as in Llama 3.1 (arXiv 2407.21783, and its published code)."""

    factor: Annotated[float, Field(gt=1.0)] = 8.0
    """How many times longer texts become."""
    original_length: PositiveInt = 8192
    """Longest text before stretching, in tokens."""
    high_freq_factor: PositiveFloat = 4.0
    """Frequencies that turn more often than this over the original length stay as they are."""
    low_freq_factor: PositiveFloat = 1.0
    """Frequencies that turn less often than this are divided by the factor; those between are blended."""


class RotaryConfig(Strict):
    """What all kinds of attention have in common: rotary positions."""

    rope_theta: Annotated[float, Field(gt=1.0)] = 10_000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig | None = None
    """Stretching to longer texts by YaRN; null: none."""
    llama3: Llama3Config | None = None
    """Stretching to longer texts as in Llama 3.1; null: none."""
    compute: Literal["auto", "fused", "products"] = "auto"
    """fused: torch's scaled_dot_product_attention; products: two batched products around a softmax whose result is kept
    for the backward pass; auto: the faster one for device and length. Equal but for rounding."""


class GroupedQueryConfig(RotaryConfig):
    """Grouped-query attention: several query heads share a key and a value head (arXiv 2305.13245)."""

    kind: Literal["gqa"] = "gqa"
    """Kind of attention."""
    causal: bool = True
    """Whether a token sees only itself and earlier ones; else all of its text, which only a classifier may."""
    kv_heads: PositiveInt | None = None
    """Key and value heads; divides model.heads. null: as many as model.heads (multi-head attention)."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: model.dim / model.heads."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias (Qwen2)."""
    out_bias: bool = False
    """Whether the output projection has a bias (gpt-oss)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: of each head (Qwen3), or over all heads together (OLMoE)."""
    window: PositiveInt | None = None
    """Positions that a token sees, itself included; null: all earlier ones."""
    full_every: PositiveInt | None = None
    """With a window: every n-th layer (the last of each n) sees all positions (gpt-oss: 2); null: none does."""
    sinks: bool = False
    """A learned score per head that takes part in the softmax and has no value (gpt-oss): a head may look nowhere."""


class LatentConfig(RotaryConfig):
    """Multi-head latent attention: keys and values are made of one small vector per token (DeepSeek-V2, 2.1)."""

    kind: Literal["mla"] = "mla"
    """Kind of attention."""
    q_rank: PositiveInt | None = None
    """Width of the compressed queries; null: queries are not compressed (DeepSeek-V2-Lite)."""
    kv_rank: PositiveInt = 512
    """Width of the compressed keys and values."""
    nope_dim: PositiveInt = 128
    """Width of a head's part of query and key without position."""
    rope_dim: PositiveInt = 64
    """Width of its part with rotary position; that of the key is shared by all heads."""
    v_dim: PositiveInt = 128
    """Width of a head's value."""


class SwitchHeadConfig(RotaryConfig):
    """Few heads whose values and outputs are made by experts: SwitchHead (arXiv 2312.07987)."""

    kind: Literal["switchhead"] = "switchhead"
    """Kind of attention."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: model.dim / model.heads."""
    experts: PositiveInt = 4
    """Experts of each head, as many for its values as for its outputs."""
    top_k: PositiveInt = 2
    """Of these, how many a token takes on either side."""
    expert_dropout: Fraction = 0.0
    """Chance that an expert is not offered to a token in training; it affects the choice, not the weights."""
    scale: PositiveFloat = 1.0
    """Multiplies the experts' weights."""
    entropy: NonNegativeFloat = 0.0
    """Weight of the routers' entropy regulariser relative to the cross-entropy per token (balance.entropy)."""


AttentionConfig: TypeAlias = Annotated[
    GroupedQueryConfig | LatentConfig | SwitchHeadConfig, Field(discriminator="kind")
]
