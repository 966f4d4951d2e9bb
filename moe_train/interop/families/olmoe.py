"""OLMoE: queries and keys normed over all heads, every layer MoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import (
    is_averaging,
    public_balance,
    read_balance,
    topk_refusals,
    uniform_refusals,
)
from moe_train.interop.families.grouped import GroupedQuery


class Olmoe(Decoder):
    """OLMoE-1B-7B (arXiv 2409.02060)."""

    model_type = "olmoe"
    class_name = "OlmoeForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "router_aux_loss_coef": 0.01,
    }
    aliases: ClassVar = {"num_experts": "num_local_experts"}
    attention = GroupedQuery(bias_key="attention_bias", out_bias=True, qk_norm="full", head_dim=False)

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""
        return {
            "activation": "swiglu",
            "num_experts": reading.integer("num_experts"),
            "top_k": reading.integer("num_experts_per_tok"),
            "expert_dim": reading.integer("intermediate_size"),
            "router": {"kind": "topk", "normalize": "selected" if reading.flag("norm_topk_prob") else "none"},
            "balance": read_balance(reading),
        }

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        return {
            "intermediate_size": model.ffn.expert_dim,
            "num_experts": model.ffn.num_experts,
            "num_experts_per_tok": model.ffn.top_k,
            "norm_topk_prob": is_averaging(model.ffn.router),
            "clip_qkv": None,
            **public_balance(model),
        }

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from uniform_refusals(model)
        yield from topk_refusals(model)
