"""What the public classes have in common: a decoder of blocks, each attention and a feed-forward part.

A class's own file states what is special about it: defaults, attention, names, and how its feed-forward part is said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Architecture, Reading
from moe_train.interop.families.experts import (
    ExpertNames,
    dense_parts,
    dense_refusals,
    expert_refusals,
    moe_parts,
    shared_refusals,
)
from moe_train.interop.families.grouped import GroupedQuery
from moe_train.interop.families.latent import Latent
from moe_train.interop.families.pieces import whole
from moe_train.interop.families.windows import read_window
from moe_train.interop.parts import Part, Parts
from moe_train.models.build import is_moe_layer

NOT_COVERED = "changes the computation in a way that is not covered"
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "other activations than silu are not covered"),
    "mlp_bias": ((False,), "biases in feed-forward networks are not covered"),
    "attention_dropout": ((0.0,), "dropout in attention is not covered"),
    "clip_qkv": ((), "clipped queries, keys and values are not covered"),
    "partial_rotary_factor": ((1.0,), "heads that are rotated in part are not covered"),
    "attention_chunk_size": ((), NOT_COVERED),
    "attention_multiplier": ((), NOT_COVERED),
    "embedding_multiplier": ((1.0,), NOT_COVERED),
    "residual_multiplier": ((1.0,), NOT_COVERED),
    "logits_scaling": ((1.0,), NOT_COVERED),
    "logit_scale": ((1.0,), NOT_COVERED),
    "query_pre_attn_scalar": ((), NOT_COVERED),
    "attn_logit_softcapping": ((), NOT_COVERED),
    "final_logit_softcapping": ((), NOT_COVERED),
    "no_rope_layers": (([],), NOT_COVERED),
    "is_causal": ((True,), "attention to later tokens is not covered"),
    "use_bidirectional_attention": ((False,), "attention to later tokens is not covered"),
}
"""Keys of config.json with one meaning that we compute: its values, and why no others."""


class Decoder(ABC):
    """A public class of decoder-only models; see `Family`."""

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    """What the published class takes where config.json says nothing."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Second names of keys."""
    fixed: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    """As `FIXED`, for this class."""
    attention: ClassVar[GroupedQuery | Latent]
    names: ClassVar[ExpertNames] = ExpertNames()
    expert_activation: ClassVar[str] = "swiglu"
    expert_bias: ClassVar[bool] = False

    def architecture(self, public: Mapping[str, Any]) -> Architecture:
        """Translate a config.json."""
        reading = Reading(public, self.defaults, self.aliases)
        for key, (allowed, why) in {**FIXED, **self.fixed}.items():
            reading.expect(key, allowed, why)
        model = {
            "dim": reading.integer("hidden_size"),
            "layers": reading.integer("num_hidden_layers"),
            "heads": reading.integer("num_attention_heads"),
            "vocab_size": reading.integer("vocab_size"),
            "tie_embeddings": reading.flag("tie_word_embeddings"),
            "norm_eps": reading.number("rms_norm_eps"),
            "init_std": reading.number("initializer_range"),
            "attention": {**self.attention.read(reading), **self.read_window(reading)},
            "ffn": self.read_ffn(reading),
            **self.read_more(reading),
        }
        # Keys that several parts of the model need are asked for several times.
        return Architecture(model, list({str(problem): problem for problem in reading.problems}.values()))

    def refusals(self, model: ModelConfig) -> list[str]:
        """Return why this class cannot express a model."""
        reasons = self.trunk_refusals(model)
        if model.ffn.num_experts == 0:
            return [*reasons, "the model is dense"]
        reasons += expert_refusals(model, self.expert_activation, self.expert_bias)
        reasons += [*dense_refusals(model), *shared_refusals(model, self.names), *self.balance_refusals(model)]
        return [*reasons, *self.ffn_refusals(model)]

    def trunk_refusals(self, model: ModelConfig) -> list[str]:
        """Return why all but the feed-forward parts cannot be expressed, and what no public class here can express."""
        own = [*self.attention.refusals(model), *self.window_refusals(model), *self.mtp_refusals(model)]
        return [*own, *foreign_refusals(model)]

    def public_config(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """Return the config.json of a model, without token ids, dtype and longest text."""
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "hidden_size": model.dim,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": model.init_std,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            **self.attention.public(model),
            **self.public_window(model),
            **self.public_ffn(model),
            **self.public_more(model),
        }

    def parts(self, model: ModelConfig, vocab_size: int) -> Parts:
        """Return the pieces that each of our tensors is made of."""
        table = {
            "embedding_VD": whole("model.embed_tokens.weight", vocab_size, model.dim),
            "norm.weight": whole("model.norm.weight", model.dim),
        }
        if not model.tie_embeddings:
            table["head.weight"] = whole("lm_head.weight", vocab_size, model.dim)
        for layer in range(model.layers):
            table |= self.block_parts(model, layer, f"blocks.{layer}")
        return table

    def block_parts(self, model: ModelConfig, layer: int, ours: str) -> dict[str, list[Part]]:
        """Return the pieces of one block, by its number and our prefix."""
        theirs = f"model.layers.{layer}"
        table = {
            f"{ours}.attention_norm.weight": whole(f"{theirs}.input_layernorm.weight", model.dim),
            f"{ours}.ffn_norm.weight": whole(f"{theirs}.post_attention_layernorm.weight", model.dim),
            **self.attention.parts(model, f"{ours}.attention", f"{theirs}.self_attn"),
        }
        if is_moe_layer(model.ffn, layer):
            return table | self.moe_parts(model, f"{ours}.ffn", theirs)
        return table | dense_parts(f"{ours}.ffn", f"{theirs}.mlp", model.dim, model.ffn.hidden_dim)

    def moe_parts(self, model: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
        """Return the pieces of a MoE layer; a scale that the class does not know goes into the down projections."""
        return moe_parts(model, self.names, ours, theirs, factor=1.0 / model.ffn.router.scale)

    def constants(self, model: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Return shape and value of public tensors that the class has and the model does not need, by name."""
        return {}

    def depth_present(self, model: ModelConfig, names: Collection[str]) -> int:
        """Return how many of the model's modules for multi-token prediction are among a folder's tensors."""
        return 0

    @abstractmethod
    def read_ffn(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of `FFNConfig`."""

    @abstractmethod
    def public_ffn(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for the feed-forward layers."""

    @abstractmethod
    def ffn_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why routers, layer patterns and sizes cannot be expressed."""

    def read_more(self, reading: Reading) -> dict[str, Any]:
        """Return further keys of `ModelConfig`."""
        return {}

    def public_more(self, model: ModelConfig) -> dict[str, Any]:
        """Return further keys of config.json."""
        return {}

    def read_window(self, reading: Reading) -> dict[str, Any]:
        """Return the keys of attention windows; a class without them may say so."""
        reading.expect("sliding_window", (), "this class has no windows")
        return read_window(reading, None)

    def public_window(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for windows."""
        return {}

    def window_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why windows cannot be expressed."""
        if isinstance(model.attention, GroupedQueryConfig) and model.attention.window is not None:
            yield f"attention.window={model.attention.window}: this class has no windows"

    def mtp_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why multi-token prediction cannot be expressed."""
        if model.mtp.depth:
            yield f"mtp.depth={model.mtp.depth}: this class has no multi-token prediction"

    def balance_refusals(self, model: ModelConfig) -> Iterator[str]:
        """Yield why balancing cannot be expressed: losses act in training only, a bias on the choice always."""
        if model.ffn.balance.loss_free is not None:
            yield "balance.loss_free: this class has no place for the bias on the choice"


def foreign_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield what none of the public classes computes."""
    if model.ffn.graph is not None:
        yield "the experts are coupled by a graph"
    if model.depth.kind != "full":
        yield "some blocks take only some tokens of a sequence"
    if model.ffn.num_experts and model.ffn.num_noop_experts:
        yield f"ffn.num_noop_experts={model.ffn.num_noop_experts}: this class has no experts that do nothing"
    if model.norm != "rms":
        yield f"norm={model.norm}, not rms"
    if model.positions != "rotary":
        yield f"positions={model.positions}, not rotary"
    if model.head_bias:
        yield "the output head has a bias"
