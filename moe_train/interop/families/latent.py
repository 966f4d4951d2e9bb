"""Multi-head latent attention of DeepSeek's classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_train.config.attention import LatentConfig
from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.pieces import whole
from moe_train.interop.families.rotary import public_rotary, read_rotary
from moe_train.interop.parts import Part

SIZES = {
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
}
"""By our key: the public one."""


class Latent:
    """The attention of DeepSeek-V2 and V3."""

    def read(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `LatentConfig`."""
        heads = reading.integer("num_attention_heads")
        reading.expect("num_key_value_heads", (heads,), "latent attention has as many keys and values as queries")
        reading.expect("attention_bias", (False,), "biases in latent attention are not covered")
        reading.expect("rope_interleave", (True,), "weights for rotary positions must be interleaved, as published")
        sizes = {ours: reading.integer(theirs) for ours, theirs in SIZES.items()}
        q_rank = None if reading.get("q_lora_rank") is None else reading.integer("q_lora_rank")
        return {"kind": "mla", "q_rank": q_rank, **sizes, **read_rotary(reading, is_latent=True)}

    def refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why the class cannot express a model's attention."""
        if not isinstance(model.attention, LatentConfig):
            yield f"attention is of kind {model.attention.kind}, not mla"

    def public(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json."""
        attention = checked(model)
        return {
            "num_key_value_heads": model.heads,
            "attention_bias": False,
            "q_lora_rank": attention.q_rank,
            **{theirs: getattr(attention, ours) for ours, theirs in SIZES.items()},
            **public_rotary(attention, is_latent=True),
        }

    def parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of one layer's attention, by the prefixes of its tensors."""
        sizes = checked(model)
        q_rows = model.heads * (sizes.nope_dim + sizes.rope_dim)
        q_order = half_split(sizes.nope_dim, sizes.rope_dim, model.heads)
        table: dict[str, list[Part]] = {}
        if sizes.q_rank is None:
            table[f"{ours}.q.weight"] = [Part(f"{theirs}.q_proj.weight", (q_rows, model.dim), rows=q_order)]
        else:
            up = Part(f"{theirs}.q_b_proj.weight", (q_rows, sizes.q_rank), rows=q_order)
            table[f"{ours}.q_down.weight"] = whole(f"{theirs}.q_a_proj.weight", sizes.q_rank, model.dim)
            table[f"{ours}.q_norm.weight"] = whole(f"{theirs}.q_a_layernorm.weight", sizes.q_rank)
            table[f"{ours}.q_up.weight"] = [up]
        kv_shape = (sizes.kv_rank + sizes.rope_dim, model.dim)
        kv_order = half_split(sizes.kv_rank, sizes.rope_dim, 1)
        table[f"{ours}.kv_down.weight"] = [Part(f"{theirs}.kv_a_proj_with_mqa.weight", kv_shape, rows=kv_order)]
        table[f"{ours}.kv_norm.weight"] = whole(f"{theirs}.kv_a_layernorm.weight", sizes.kv_rank)
        kv_rows = model.heads * (sizes.nope_dim + sizes.v_dim)
        table[f"{ours}.kv_up.weight"] = whole(f"{theirs}.kv_b_proj.weight", kv_rows, sizes.kv_rank)
        table[f"{ours}.out.weight"] = whole(f"{theirs}.o_proj.weight", model.dim, model.heads * sizes.v_dim)
        return table


def half_split(plain: int, rotated: int, heads: int) -> Tensor:
    """Return the public row of each of ours, [heads · (plain + rotated)] int64.

    Public weights turn the pairs (2i, 2i + 1) of the rotated rows, ours (i, i + rotated/2).
    """
    row = torch.arange(plain + rotated)
    one = torch.cat([row[:plain], row[plain::2], row[plain + 1 :: 2]])
    return (one + (plain + rotated) * torch.arange(heads).unsqueeze(1)).flatten()


def checked(model: ModelConfig) -> LatentConfig:
    """Return the attention of a model that was not refused."""
    assert isinstance(model.attention, LatentConfig), "refused models are not translated"
    return model.attention
