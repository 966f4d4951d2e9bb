"""Qwen2-MoE and Qwen3-MoE: dense layers in between, a gated shared expert (2) or normed heads (3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import (
    ExpertNames,
    is_averaging,
    public_balance,
    read_balance,
    topk_refusals,
)
from moe_train.interop.families.grouped import GroupedQuery
from moe_train.interop.families.windows import FULL, SLIDING, public_types, read_window
from moe_train.models.build import is_moe_layer, shared_width

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.001,
}
"""Defaults of both classes."""


class Qwen(Decoder):
    """What both have in common."""

    aliases: ClassVar = {"num_experts": "num_local_experts"}

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""
        every = reading.integer("decoder_sparse_step")
        return {
            "hidden_dim": reading.integer("intermediate_size"),
            "activation": "swiglu",
            "num_experts": reading.integer("num_experts"),
            "top_k": reading.integer("num_experts_per_tok"),
            "expert_dim": reading.integer("moe_intermediate_size"),
            **self.read_shared(reading),
            "every": every,
            "first_dense": read_first_dense(reading, every),
            "router": {"kind": "topk", "normalize": "selected" if reading.flag("norm_topk_prob") else "none"},
            "balance": read_balance(reading),
        }

    @abstractmethod
    def read_shared(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of shared experts."""

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        ffn = model.ffn
        return {
            "intermediate_size": ffn.hidden_dim,
            "moe_intermediate_size": ffn.expert_dim,
            "num_experts": ffn.num_experts,
            "num_experts_per_tok": ffn.top_k,
            "decoder_sparse_step": ffn.every,
            "mlp_only_layers": list(range(min(ffn.first_dense, model.layers))),
            "norm_topk_prob": is_averaging(ffn.router),
            **public_balance(model),
        }

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from topk_refusals(model)


class Qwen2Moe(Qwen):
    """Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (arXiv 2407.10671)."""

    model_type = "qwen2_moe"
    class_name = "Qwen2MoeForCausalLM"
    defaults: ClassVar = SIZES | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    }
    attention = GroupedQuery(bias_key="qkv_bias")
    names = ExpertNames(shared="shared_expert", shared_gate="shared_expert_gate")

    def read_shared(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of shared experts."""
        width = reading.integer("shared_expert_intermediate_size")
        return {"num_shared_experts": 1, "shared_dim": width, "shared_gate": True}

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        return {**super().public_ffn(model), "shared_expert_intermediate_size": shared_width(model.ffn)}

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from super().ffn_refusals(model)
        if not model.ffn.num_shared_experts:
            yield "has no shared expert"

    def read_window(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of attention windows: of the layers that layer_types names, or every other one."""
        layers, last = reading.integer("num_hidden_layers"), reading.get("max_window_layers") or 0
        is_on = reading.flag("use_sliding_window")
        default = [SLIDING if is_on and layer % 2 == 0 and layer < last else FULL for layer in range(layers)]
        types = reading.get("layer_types") or default
        if SLIDING in types and not is_on:
            reading.refuse("use_sliding_window", "layer_types names layers with a window", "correct one of them")
        return read_window(reading, reading.get("sliding_window"), types)

    def public_window(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for windows."""
        assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
        if SLIDING not in (types := public_types(model)):
            return {"use_sliding_window": False}
        return {
            "use_sliding_window": True,
            "sliding_window": model.attention.window,
            "max_window_layers": model.layers,
            "layer_types": types,
        }

    def window_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why windows cannot be expressed: all can."""
        yield from ()


class Qwen3Moe(Qwen):
    """Qwen3-30B-A3B and Qwen3-235B-A22B (arXiv 2505.09388)."""

    model_type = "qwen3_moe"
    class_name = "Qwen3MoeForCausalLM"
    defaults: ClassVar = SIZES | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    }
    attention = GroupedQuery(bias_key="attention_bias", out_bias=True, qk_norm="head")

    def read_shared(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of shared experts: there are none."""
        return {}

    def read_window(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of attention windows: sliding_window is that of all layers, where it is used."""
        if not reading.flag("use_sliding_window"):
            return read_window(reading, None)
        reading.expect("max_window_layers", (0,), "readers disagree on which layers have the window")
        return read_window(reading, reading.get("sliding_window"))

    def public_window(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for windows."""
        assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
        window = model.attention.window
        if window is None:
            return {"use_sliding_window": False}
        return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}

    def window_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why windows cannot be expressed."""
        if isinstance(model.attention, GroupedQueryConfig) and model.attention.full_every is not None:
            yield f"attention.full_every={model.attention.full_every}: all layers must have the same window"


def read_first_dense(reading: Reading, every: int) -> int:
    """Return how many first layers are dense by mlp_only_layers.

    Args:
        reading: config.json.
        every: of the layers, every n-th is MoE.
    """
    layers, listed = reading.integer("num_hidden_layers"), list(reading.get("mlp_only_layers") or [])
    sparse = {layer for layer in range(layers) if (layer + 1) % every == 0}
    removed = sparse & set(listed)
    first = max(removed, default=-1) + 1
    pattern = FFNConfig(num_experts=1, every=every, first_dense=first)
    if {layer for layer in range(layers) if is_moe_layer(pattern, layer)} != sparse - removed:
        rule = "dense layers other than the first ones are not covered"
        reading.refuse("mlp_only_layers", rule, "choose another model", ",".join(map(str, listed)))
    elif not sparse - removed:
        key = "mlp_only_layers" if sparse else "decoder_sparse_step"
        reading.refuse(key, "leaves no MoE layer", "choose another model")
    return first
