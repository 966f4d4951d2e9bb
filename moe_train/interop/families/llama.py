"""Llama: the dense family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import dense_refusals
from moe_train.interop.families.grouped import GroupedQuery


class Llama(Decoder):
    """Dense blocks (LlamaForCausalLM)."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
    }
    attention = GroupedQuery(bias_key="attention_bias", out_bias=True)

    def refusals(self, model: ModelConfig) -> list[str]:
        """Return why this class cannot express a model."""
        return [*self.trunk_refusals(model), *dense_refusals(model), *self.ffn_refusals(model)]

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""
        return {"hidden_dim": reading.integer("intermediate_size"), "activation": "swiglu", "num_experts": 0}

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        return {"intermediate_size": model.ffn.hidden_dim, "mlp_bias": False}

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why layers cannot be expressed."""
        if model.ffn.num_experts:
            yield "the model has experts"
