"""gpt-oss: sinks, windows in every other layer, biases everywhere, experts fused in interleaved tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.config.routing import TopKSoftmaxRouterConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import public_balance, read_balance, uniform_refusals
from moe_train.interop.families.grouped import GroupedQuery
from moe_train.interop.families.pieces import whole
from moe_train.interop.families.windows import FULL, SLIDING, public_types, read_window
from moe_train.interop.parts import Part

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Of the one clamped SwiGLU that we compute, as published."""
WINDOW = 128
"""The class makes the mask of windows even where no layer has one: it needs a number."""


class GptOss(Decoder):
    """gpt-oss-20b and gpt-oss-120b (arXiv 2508.10925).

    Other patterns of windows than the published one are said by layer_types; a reader that knows only the published
    pattern (vLLM) must not get them.
    """

    model_type = "gpt_oss"
    class_name = "GptOssForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "router_aux_loss_coef": 0.001,
    }
    aliases: ClassVar = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
    fixed: ClassVar = {
        "swiglu_alpha": ((SWIGLU_ALPHA,), "another gain of the clamped SwiGLU is not covered"),
        "swiglu_limit": ((SWIGLU_LIMIT,), "another limit of the clamped SwiGLU is not covered"),
    }
    attention = GroupedQuery(bias_key="attention_bias", out_bias=True, sinks=True)
    expert_activation = "swiglu_clamped"
    expert_bias = True

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""
        return {
            "expert_activation": self.expert_activation,
            "expert_bias": True,
            "num_experts": reading.integer("num_local_experts"),
            "top_k": reading.integer("num_experts_per_tok"),
            "expert_dim": reading.integer("intermediate_size"),
            "router": {"kind": "topk_softmax", "bias": True},
            "balance": read_balance(reading),
        }

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        return {
            "intermediate_size": model.ffn.expert_dim,
            "num_local_experts": model.ffn.num_experts,
            "num_experts_per_tok": model.ffn.top_k,
            "swiglu_alpha": SWIGLU_ALPHA,
            "swiglu_limit": SWIGLU_LIMIT,
            **public_balance(model),
        }

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from uniform_refusals(model)
        router = model.ffn.router
        if not isinstance(router, TopKSoftmaxRouterConfig):
            yield f"router.kind={router.kind}, not topk_softmax"
        elif router.gate_dim is not None:
            yield "the router has a hidden layer: router.gate_dim"
        elif not router.bias:
            yield "the router has no bias"

    def read_window(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of attention windows: of the layers that layer_types names, or every other one."""
        layers, window = reading.integer("num_hidden_layers"), reading.get("sliding_window")
        types = reading.get("layer_types") or [SLIDING if layer % 2 == 0 else FULL for layer in range(layers)]
        if SLIDING in types and window is None:
            reading.refuse("sliding_window", "layers with a window need its size", "state it")
        return read_window(reading, window, types)

    def public_window(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for windows."""
        assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
        return {"sliding_window": model.attention.window or WINDOW, "layer_types": public_types(model)}

    def window_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why windows cannot be expressed: all can."""
        yield from ()

    def moe_parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of a MoE layer: one public tensor for all experts, its columns gate, up, gate, up, ..."""
        dim, hidden, experts = model.dim, model.ffn.expert_dim, model.ffn.num_experts
        mlp, fused = f"{theirs}.mlp", f"{theirs}.mlp.experts"
        factor = 1.0 / model.ffn.router.scale
        every, all_of = slice(None), range(experts)
        halves = [(slice(start * hidden, (start + 1) * hidden), slice(start, 2 * hidden, 2)) for start in (0, 1)]
        wide, narrow = (experts, dim, 2 * hidden), (experts, hidden, dim)
        return {
            f"{ours}.router.weight": whole(f"{mlp}.router.weight", experts, dim),
            f"{ours}.router.logit_bias_E": whole(f"{mlp}.router.bias", experts),
            f"{ours}.experts.gate_up_LDF2": [
                Part(f"{fused}.gate_up_proj", wide, ours=(e, every, half), theirs=(e, every, columns))
                for e in all_of
                for half, columns in halves
            ],
            f"{ours}.experts.gate_up_bias_LF2": [
                Part(f"{fused}.gate_up_proj_bias", (experts, 2 * hidden), ours=(e, half), theirs=(e, columns))
                for e in all_of
                for half, columns in halves
            ],
            f"{ours}.experts.down_LFD": [
                Part(f"{fused}.down_proj", narrow, ours=(e,), theirs=(e,), factor=factor) for e in all_of
            ],
            f"{ours}.experts.down_bias_LD": [
                Part(f"{fused}.down_proj_bias", (experts, dim), ours=(e,), theirs=(e,), factor=factor) for e in all_of
            ],
        }
