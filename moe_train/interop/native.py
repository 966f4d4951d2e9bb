"""The project's own layout of safetensors, for models that no public class expresses: one tensor per expert."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_train.config.model import HOW_NOT_WHAT, ModelConfig
from moe_train.interop.families import family_of
from moe_train.interop.families.base import Architecture, Family
from moe_train.interop.parts import Part, Parts
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, roles_of

MODEL_TYPE = "moe_train"
NOT_EXPORTED: dict[str, Any] = {"init_from": True, "adopt": True, **HOW_NOT_WHAT}
"""Keys of the model section that say where weights come from, not what the model is."""


@dataclass(frozen=True)
class Native:
    """A `Family` that expresses every model of ours, and that nobody else reads."""

    model_type: str = MODEL_TYPE
    class_name: str = "Transformer"

    def architecture(self, public: Mapping[str, Any]) -> Architecture:
        """Return the model section as it was exported; validation finds what is wrong with it."""
        model = public.get("model")
        return Architecture({**(model if isinstance(model, Mapping) else {}), "vocab_size": public.get("vocab_size")})

    def refusals(self, model: ModelConfig) -> list[str]:
        """Return nothing: every model can be written down."""
        return []

    def public_config(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """Return the config.json."""
        section = model.model_dump(mode="json", exclude=NOT_EXPORTED)
        return {"model_type": MODEL_TYPE, "model": section, "vocab_size": vocab_size}

    def parts(self, model: ModelConfig, vocab_size: int) -> Parts:
        """Return each of our tensors whole under its own name, those of experts one by one: ``NAME.EXPERT``."""
        whole = build_model(model, vocab_size, LocalExchange(model.ffn.num_experts), "fp32", torch.device("meta"))
        experts = {name for name, role in roles_of(whole).items() if role.kind is Kind.EXPERT}
        table: dict[str, list[Part]] = {}
        for name, tensor in whole.state_dict().items():
            shape = tuple(tensor.shape)
            if name in experts:
                table[name] = [Part(f"{name}.{expert}", shape[1:], ours=(expert,)) for expert in range(shape[0])]
            else:
                table[name] = [Part(name, shape)]
        return table

    def constants(self, model: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Return nothing: all public tensors are ours."""
        return {}

    def depth_present(self, model: ModelConfig, names: Collection[str]) -> int:
        """Return how many of the model's modules for multi-token prediction are among a folder's tensors."""
        prefixes = {name.split(".")[1] for name in names if name.startswith("mtp.")}
        return min(model.mtp.depth, len(prefixes))


NATIVE = Native()


def family_in(public: Mapping[str, Any], path: Path) -> Family:
    """Return the table for a folder's config.json, be it public or our own.

    Raises:
        DataError: an unknown model_type.
    """
    return NATIVE if public.get("model_type") == MODEL_TYPE else family_of(public, path)
