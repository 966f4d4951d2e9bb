"""DeepSeek-V3: sigmoid scores, a bias on the choice, multi-token prediction."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from moe_train.config.model import ModelConfig
from moe_train.config.routing import GroupLimitedRouterConfig, SigmoidRouterConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.deepseek import DeepSeek, moe_layers
from moe_train.interop.families.pieces import whole
from moe_train.interop.parts import Part, Parts
from moe_train.models.build import is_moe_layer

AUX_COEF = 1e-4
"""Coefficient of the loss per sequence (arXiv 2412.19437, 4.2)."""
BIAS = "mlp.gate.e_score_correction_bias"
"""The public bias on the choice, within a layer."""


class DeepSeekV3(DeepSeek):
    """DeepSeek-V3 and R1 (arXiv 2412.19437)."""

    model_type = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "num_nextn_predict_layers": 1,
    }
    aliases: ClassVar = DeepSeek.aliases | {"num_nextn_predict_layers": "num_mtp_layers"}
    fixed: ClassVar = DeepSeek.fixed | {
        "scoring_func": (("sigmoid",), "this class has sigmoid scores"),
        "topk_method": (("noaux_tc",), "is no method of this class"),
    }

    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`; balancing as in the paper."""
        router = {
            "kind": "group_limited",
            "scores": "sigmoid",
            "groups": reading.integer("n_group"),
            "top_groups": reading.integer("topk_group"),
            "group_score": "top2",
            "normalize": "selected" if reading.flag("norm_topk_prob") else "none",
            "scale": reading.number("routed_scaling_factor"),
        }
        balance = {"loss_free": {}, "aux": {"coef": AUX_COEF, "scope": "sequence"}}
        return self.read_sizes(reading) | {"router": router, "balance": balance}

    def read_more(self, reading: Reading) -> dict[str, Any]:
        """Return the depth of multi-token prediction; a folder may lack its tensors all the same."""
        return {"mtp": {"depth": reading.count("num_nextn_predict_layers")}}

    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers; without groups there is one."""
        router = model.ffn.router
        assert isinstance(router, SigmoidRouterConfig | GroupLimitedRouterConfig), "refused models are not translated"
        groups, top_groups = 1, 1
        if isinstance(router, GroupLimitedRouterConfig) and router.top_groups < router.groups:
            groups, top_groups = router.groups, router.top_groups
        return self.public_sizes(model) | {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": router.normalize == "selected",
            "n_group": groups,
            "topk_group": top_groups,
        }

    def public_more(self, model: ModelConfig) -> dict[str, Any]:
        """Return the depth of multi-token prediction."""
        return {"num_nextn_predict_layers": model.mtp.depth, "rope_interleave": True}

    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""
        yield from super().ffn_refusals(model)
        router = model.ffn.router
        if isinstance(router, GroupLimitedRouterConfig):
            if router.scores != "sigmoid":
                yield f"router.scores={router.scores}, not sigmoid"
            if router.group_score != "top2" and router.top_groups < router.groups:
                yield f"router.group_score={router.group_score}, not top2"
        elif not isinstance(router, SigmoidRouterConfig):
            yield f"router.kind={router.kind}"
        if model.ffn.num_experts < 2:
            yield "one expert: groups are chosen by their two best"

    def mtp_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why multi-token prediction cannot be expressed."""
        if model.mtp.depth and model.ffn.num_experts and not is_moe_layer(model.ffn, model.layers):
            yield f"mtp.depth={model.mtp.depth}: the modules' layers must be MoE"

    def balance_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why balancing cannot be expressed: it can, the bias on the choice included."""
        yield from ()

    def moe_parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of a MoE layer, with the bias on the choice where the model has one."""
        table = super().moe_parts(model, ours, theirs)
        if model.ffn.balance.loss_free is not None:
            table[f"{ours}.router.bias_E"] = whole(f"{theirs}.{BIAS}", model.ffn.num_experts)
        return table

    def constants(self, model: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Return also the biases on the choice of a model that has none: zeros."""
        found = dict(super().constants(model))
        if model.ffn.balance.loss_free is None:
            found |= {f"model.layers.{layer}.{BIAS}": ((model.ffn.num_experts,), 0.0) for layer in moe_layers(model)}
        return found

    def parts(self, model: ModelConfig, vocab_size: int) -> Parts:
        """Return the pieces that each of our tensors is made of; prediction modules follow the layers."""
        table: dict[str, list[Part]] = {name: list(parts) for name, parts in super().parts(model, vocab_size).items()}
        shape = (vocab_size, model.dim)
        head = "embedding_VD" if model.tie_embeddings else "head.weight"
        for k in range(model.mtp.depth):
            layer = model.layers + k
            theirs = f"model.layers.{layer}"
            table["embedding_VD"].append(Part(f"{theirs}.embed_tokens.weight", shape, copy=True))
            table[head].append(Part(f"{theirs}.shared_head.head.weight", shape, copy=True))
            table |= {
                f"mtp.{k}.embedding_norm.weight": whole(f"{theirs}.enorm.weight", model.dim),
                f"mtp.{k}.hidden_norm.weight": whole(f"{theirs}.hnorm.weight", model.dim),
                f"mtp.{k}.project.weight": whole(f"{theirs}.eh_proj.weight", model.dim, 2 * model.dim),
                f"mtp.{k}.norm.weight": whole(f"{theirs}.shared_head.norm.weight", model.dim),
                **self.block_parts(model, layer, f"mtp.{k}.block"),
            }
        return table

    def depth_present(self, model: ModelConfig, names: Collection[str]) -> int:
        """Return how many of the model's modules for multi-token prediction are among a folder's tensors.

        transformers leaves them out when it saves, whatever its config.json says.
        """
        for k in range(model.mtp.depth):
            if f"model.layers.{model.layers + k}.eh_proj.weight" not in names:
                return k
        return model.mtp.depth
