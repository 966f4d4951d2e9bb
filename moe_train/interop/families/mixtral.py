"""Mixtral: every layer MoE, weights averaged over the chosen experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.config.routing import LearnedRouterConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import (
    ExpertNames,
    averaging_refusals,
    public_balance,
    read_balance,
    uniform_refusals,
)
from moe_train.interop.families.grouped import GroupedQuery
from moe_train.interop.families.windows import read_window


class Mixtral(Decoder):
    """Mixtral 8x7B and 8x22B (arXiv 2401.04088).

    router_jitter_noise becomes router.jitter, which leaves the experts' input alone: the public class, in training,
    multiplies that too.
    """

    model_type = "mixtral"
    class_name = "MixtralForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    aliases: ClassVar = {"num_local_experts": "num_experts"}
    attention = GroupedQuery()
    names = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""
        return {
            "activation": "swiglu",
            "num_experts": reading.integer("num_local_experts"),
            "top_k": reading.integer("num_experts_per_tok"),
            "expert_dim": reading.integer("intermediate_size"),
            "router": {"kind": "topk_softmax", "jitter": reading.number("router_jitter_noise")},
            "balance": read_balance(reading),
        }

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        ffn = model.ffn
        return {
            "intermediate_size": ffn.expert_dim,
            "num_local_experts": ffn.num_experts,
            "num_experts_per_tok": ffn.top_k,
            "router_jitter_noise": ffn.router.jitter if isinstance(ffn.router, LearnedRouterConfig) else 0.0,
            **public_balance(model),
        }

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from uniform_refusals(model)
        yield from averaging_refusals(model)

    def read_window(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of attention windows: sliding_window is that of all layers."""
        return read_window(reading, reading.get("sliding_window"))

    def public_window(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for windows."""
        assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
        return {"sliding_window": model.attention.window}

    def window_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why windows cannot be expressed."""
        if isinstance(model.attention, GroupedQueryConfig) and model.attention.full_every is not None:
            yield f"attention.full_every={model.attention.full_every}: all layers must have the same window"
