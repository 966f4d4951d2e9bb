"""Grouped-query attention of public classes: which of its options a class has, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.pieces import stacked, whole
from moe_train.interop.families.rotary import public_rotary, read_rotary
from moe_train.interop.parts import Part
from moe_train.models.attention import head_width


@dataclass(frozen=True)
class GroupedQuery:
    """What the attention of a public class can say.

    Attributes:
        bias_key: key of config.json for biases; None: it has none.
        out_bias: whether that key is for the output projection too.
        qk_norm: norm of queries and keys, fixed by the class.
        head_dim: whether heads may have another width than hidden_size / num_attention_heads.
        sinks: whether there is a learned sink per head, fixed by the class.
    """

    bias_key: str | None = None
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    head_dim: bool = True
    sinks: bool = False

    def read(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `GroupedQueryConfig`, but for the windows."""
        dim, heads = reading.integer("hidden_size"), reading.integer("num_attention_heads")
        if not self.head_dim:
            reading.expect(
                "head_dim", (dim // heads,), "this class has heads of width hidden_size / num_attention_heads"
            )
        stated = reading.get("head_dim") is not None and self.head_dim
        width = reading.integer("head_dim") if stated else dim // heads
        has_bias = self.bias_key is not None and reading.flag(self.bias_key)
        return {
            "kind": "gqa",
            "kv_heads": reading.count("num_key_value_heads") or heads,
            "head_dim": None if width * heads == dim else width,
            "qkv_bias": has_bias,
            "out_bias": has_bias and self.out_bias,
            "qk_norm": self.qk_norm,
            "sinks": self.sinks,
            **read_rotary(reading, is_latent=False),
        }

    def refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why the class cannot express a model's attention."""
        attention = model.attention
        if not isinstance(attention, GroupedQueryConfig):
            yield f"attention is of kind {attention.kind}, not gqa"
            return
        if attention.qk_norm != self.qk_norm:
            yield f"attention.qk_norm={attention.qk_norm}, not {self.qk_norm}"
        if attention.sinks != self.sinks:
            yield "attention has no sinks" if self.sinks else "attention has sinks"
        yield from self.bias_refusals(attention)
        if not self.head_dim and head_width(model, attention) * model.heads != model.dim:
            yield f"attention.head_dim={attention.head_dim} is not dim / heads"

    def bias_refusals(self, attention: GroupedQueryConfig) -> Iterator[str]:
        """Yield why the class cannot express the biases."""
        if self.bias_key is None and attention.qkv_bias:
            yield "queries, keys and values have biases"
        if not self.out_bias and attention.out_bias:
            yield "the output projection of attention has a bias"
        if self.out_bias and attention.qkv_bias != attention.out_bias:
            yield "biases of attention: all projections have one, or none has"

    def public(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json."""
        attention = checked(model)
        keys: dict[str, Any] = {"num_key_value_heads": attention.kv_heads or model.heads}
        if self.head_dim:
            keys["head_dim"] = head_width(model, attention)
        if self.bias_key is not None:
            keys[self.bias_key] = attention.qkv_bias
        return keys | public_rotary(attention, is_latent=False)

    def parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of one layer's attention, by the prefixes of its tensors."""
        attention = checked(model)
        width = head_width(model, attention)
        q, kv = model.heads * width, (attention.kv_heads or model.heads) * width
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        table = {
            f"{ours}.qkv.weight": stacked({f"{theirs}.{name}.weight": n for name, n in rows.items()}, model.dim),
            f"{ours}.out.weight": whole(f"{theirs}.o_proj.weight", model.dim, q),
        }
        if attention.qkv_bias:
            table[f"{ours}.qkv.bias"] = stacked({f"{theirs}.{name}.bias": n for name, n in rows.items()})
        if attention.out_bias:
            table[f"{ours}.out.bias"] = whole(f"{theirs}.o_proj.bias", model.dim)
        if attention.qk_norm != "none":
            sizes = (width, width) if attention.qk_norm == "head" else (q, kv)
            for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
                table[f"{ours}.{name}.weight"] = whole(f"{theirs}.{name}.weight", size)
        if attention.sinks:
            table[f"{ours}.sinks_H"] = whole(f"{theirs}.sinks", model.heads)
        return table


def checked(model: ModelConfig) -> GroupedQueryConfig:
    """Return the attention of a model that was not refused."""
    assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
    return model.attention
