"""DeepSeek-V2, and what V3 takes over: latent attention, dense first layers, shared experts without gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from moe_train.config.model import ModelConfig
from moe_train.config.routing import GroupLimitedRouterConfig, TopKRouterConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.decoder import Decoder
from moe_train.interop.families.experts import ExpertNames, moe_parts
from moe_train.interop.families.latent import Latent
from moe_train.interop.parts import Part
from moe_train.models.build import is_moe_layer, shared_width

V2_LOSSES = {"aux": 0.003, "device": 0.05, "communication": 0.02}
"""Coefficients of DeepSeek-V2 (arXiv 2405.04434, 3.1.2)."""


class DeepSeek(Decoder):
    """What both have in common."""

    aliases: ClassVar = {"n_routed_experts": "num_local_experts"}
    fixed: ClassVar = {"moe_layer_freq": ((1,), "dense layers other than the first ones are not covered")}
    attention = Latent()
    names = ExpertNames(shared="shared_experts")

    def read_sizes(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig` but for routing."""
        return {
            "hidden_dim": reading.integer("intermediate_size"),
            "activation": "swiglu",
            "num_experts": reading.integer("n_routed_experts"),
            "top_k": reading.integer("num_experts_per_tok"),
            "expert_dim": reading.integer("moe_intermediate_size"),
            "num_shared_experts": reading.count("n_shared_experts"),
            "first_dense": reading.count("first_k_dense_replace"),
        }

    def public_sizes(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers but for routing."""
        ffn = model.ffn
        return {
            "intermediate_size": ffn.hidden_dim,
            "moe_intermediate_size": ffn.expert_dim,
            "n_routed_experts": ffn.num_experts,
            "num_experts_per_tok": ffn.top_k,
            "n_shared_experts": shared_width(ffn) // ffn.expert_dim,
            "first_k_dense_replace": ffn.first_dense,
            "moe_layer_freq": 1,
            "routed_scaling_factor": ffn.router.scale,
        }

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why layer patterns and sizes cannot be expressed."""
        ffn = model.ffn
        if ffn.every > 1:
            yield f"every={ffn.every}: all layers after the first dense ones must be MoE"
        if shared_width(ffn) % ffn.expert_dim:
            yield f"the shared experts' width {shared_width(ffn)} is no multiple of expert_dim={ffn.expert_dim}"

    def moe_parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of a MoE layer; the class knows the scale."""
        return moe_parts(model, self.names, ours, theirs, factor=1.0)

    def constants(self, model: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Return the shared experts of a model that has none: tensors without elements, as the class has them."""
        if model.ffn.num_shared_experts:
            return {}
        shapes = {"gate_proj": (0, model.dim), "up_proj": (0, model.dim), "down_proj": (model.dim, 0)}
        return {
            f"model.layers.{layer}.mlp.shared_experts.{name}.weight": (shape, 0.0)
            for layer in moe_layers(model)
            for name, shape in shapes.items()
        }


def moe_layers(model: ModelConfig) -> list[int]:
    """Return the public numbers of the MoE layers, those of multi-token prediction included."""
    return [layer for layer in range(model.layers + model.mtp.depth) if is_moe_layer(model.ffn, layer)]


class DeepSeekV2(DeepSeek):
    """DeepSeek-V2 and V2-Lite (arXiv 2405.04434)."""

    model_type = "deepseek_v2"
    class_name = "DeepseekV2ForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        # Not of the class: of the published files, which state it.
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    }
    fixed: ClassVar = DeepSeek.fixed | {
        "scoring_func": (("softmax",), "this class has softmax scores"),
        "norm_topk_prob": ((False,), "the public class does not normalise, other readers do"),
    }

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`; losses on the load as in the paper where experts have groups."""
        sizes, scale = self.read_sizes(reading), reading.number("routed_scaling_factor")
        reading.expect("topk_method", ("greedy", "group_limited_greedy"), "is no method of this class")
        if reading.get("topk_method") != "group_limited_greedy":
            aux: dict[str, Any] = {"coef": reading.number("aux_loss_alpha")}
            aux |= {"scope": "sequence"} if reading.flag("seq_aux") else {}
            router = {"kind": "topk", "normalize": "none", "scale": scale}
            return sizes | {"router": router, "balance": {"aux": aux} if aux["coef"] else {}}
        groups = reading.integer("n_group")
        router = {
            "kind": "group_limited",
            "scores": "softmax",
            "groups": groups,
            "top_groups": reading.integer("topk_group"),
            "group_score": "max",
            "normalize": "none",
            "scale": scale,
        }
        losses: dict[str, dict[str, Any]] = {
            name: {"coef": coef, "scope": "sequence"} for name, coef in V2_LOSSES.items()
        }
        for name in ("device", "communication"):
            losses[name]["devices"] = groups
        return sizes | {"router": router, "balance": losses}

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""
        router, aux = model.ffn.router, model.ffn.balance.aux
        keys = self.public_sizes(model) | {
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "aux_loss_alpha": 0.0 if aux is None else aux.coef,
            "seq_aux": aux is not None and aux.scope == "sequence",
        }
        if isinstance(router, GroupLimitedRouterConfig):
            groups = {"n_group": router.groups, "topk_group": router.top_groups}
            return keys | {"topk_method": "group_limited_greedy", **groups}
        return keys | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from super().ffn_refusals(model)
        router = model.ffn.router
        if not isinstance(router, TopKRouterConfig | GroupLimitedRouterConfig):
            yield f"router.kind={router.kind}"
            return
        if router.normalize != "none":
            yield f"router.normalize={router.normalize}: this class does not normalise"
        if isinstance(router, GroupLimitedRouterConfig):
            if router.scores != "softmax":
                yield f"router.scores={router.scores}, not softmax"
            if router.group_score != "max" and router.top_groups < router.groups:
                yield f"router.group_score={router.group_score}, not max"
