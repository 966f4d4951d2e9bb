"""Families of public models: one table each between a class of transformers and our models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.errors import DataError, Problem
from moe_train.interop.families.base import Architecture, Family
from moe_train.interop.families.deepseek import DeepSeekV2
from moe_train.interop.families.deepseek_v3 import DeepSeekV3
from moe_train.interop.families.gpt_oss import GptOss
from moe_train.interop.families.llama import Llama
from moe_train.interop.families.mixtral import Mixtral
from moe_train.interop.families.olmoe import Olmoe
from moe_train.interop.families.qwen import Qwen2Moe, Qwen3Moe

ALL: tuple[Family, ...] = (
    Llama(), Mixtral(), Qwen3Moe(), Qwen2Moe(), Olmoe(), GptOss(), DeepSeekV3(), DeepSeekV2()
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in ALL}
"""By `model_type`, in order of preference for export."""

__all__ = ["FAMILIES", "Architecture", "Family", "expressed_by", "family_of"]


def family_of(public: Mapping[str, Any], path: Path) -> Family:
    """Return the family of a config.json.

    Args:
        public: what it holds.
        path: where it lies, for messages.

    Raises:
        DataError: its model_type is none of `FAMILIES`.
    """
    model_type = public.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    rule = f"is none of the kinds of models that can be read: {', '.join(FAMILIES)}"
    raise DataError(Problem(f"{path} model_type", model_type, rule, "choose a model of one of these kinds"))


def expressed_by(model: ModelConfig) -> Family | list[str]:
    """Return the first family that can express a model, or why none can, a line for each family and reason."""
    reasons = []
    for family in FAMILIES.values():
        refusals = family.refusals(model)
        if not refusals:
            return family
        reasons += [f"{family.model_type}: {reason}" for reason in refusals]
    return reasons
