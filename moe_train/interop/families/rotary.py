"""Rotary positions in config.json: `rope_theta` and `rope_scaling` of old, `rope_parameters` of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_train.config.attention import Llama3Config, RotaryConfig, YarnConfig
from moe_train.interop.families.base import Reading
from moe_train.ops.rotary import magnitude, rotary_magnitude


def read_rotary(reading: Reading, is_latent: bool) -> dict[str, Any]:
    """Return the keys of `RotaryConfig`, by transformers' rules of precedence.

    Args:
        reading: config.json.
        is_latent: whether scores have a magnitude of their own (DeepSeek).
    """
    default = reading.defaults.get("rope_parameters")
    stated = reading.get("rope_scaling") or reading.get("rope_parameters") or default or {}
    if not isinstance(stated, Mapping):
        reading.refuse("rope_parameters", "must be a mapping", "correct it", stated)
        stated = {}
    if any(isinstance(value, Mapping) for value in stated.values()):
        reading.refuse(
            "rope_parameters", "rotary positions that differ between layers are not covered", "choose another model"
        )
        stated = {}
    kind = stated.get("rope_type", stated.get("type", "default"))
    if stated.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        rule, remedy = "heads that are rotated in part are not covered", "choose another model"
        reading.refuse("rope_parameters.partial_rotary_factor", rule, remedy, stated["partial_rotary_factor"])
    if kind not in ("default", "yarn", "llama3"):
        rule = "is a kind of stretching that is not covered"
        reading.refuse("rope_parameters.rope_type", rule, "choose a model with rope_type=default, yarn or llama3", kind)
    theta = stated.get("rope_theta") or reading.get("rope_theta") or reading.defaults.get("rope_theta", 10_000.0)
    return {
        "rope_theta": theta,
        "yarn": read_yarn(reading, stated, is_latent) if kind == "yarn" else None,
        "llama3": read_llama3(reading, stated) if kind == "llama3" else None,
    }


def read_llama3(reading: Reading, stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the keys of `Llama3Config`; None where a factor of 1 changes nothing."""
    factor = stated_number(reading, stated, "factor", 1.0)
    if factor <= 1.0:
        if factor < 1.0:
            rule = "stretching must make texts longer"
            reading.refuse("rope_parameters.factor", rule, "choose a model without rope_scaling", factor)
        return None
    original = stated.get("original_max_position_embeddings") or reading.integer("max_position_embeddings")
    return {
        "factor": factor,
        "original_length": original,
        "high_freq_factor": stated_number(reading, stated, "high_freq_factor", 4.0),
        "low_freq_factor": stated_number(reading, stated, "low_freq_factor", 1.0),
    }


def read_yarn(reading: Reading, stated: Mapping[str, Any], is_latent: bool) -> dict[str, Any] | None:
    """Return the keys of `YarnConfig`; None where a factor of 1 changes nothing."""
    longest = reading.integer("max_position_embeddings")
    original = reading.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings")
    original = original or longest
    factor = stated_number(reading, stated, "factor", longest / original)
    if factor <= 1.0:
        if factor < 1.0 or stated.get("attention_factor") not in (None, 1.0):
            rule = "YaRN must make texts longer"
            reading.refuse("rope_parameters.factor", rule, "choose a model without rope_scaling", factor)
        return None
    return {
        "factor": factor,
        "original_length": original,
        "beta_fast": stated_number(reading, stated, "beta_fast", 0.0) or 32.0,
        "beta_slow": stated_number(reading, stated, "beta_slow", 0.0) or 1.0,
        "truncate": bool(stated.get("truncate", True)),
        **read_magnitudes(reading, stated, factor, is_latent),
    }


def stated_number(reading: Reading, stated: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of rope_parameters; null is the default, and anything else than a number a problem."""
    value = stated.get(key)
    if value is None:
        return default
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    reading.refuse(f"rope_parameters.{key}", "must be a number", "correct it", value)
    return default


def read_magnitudes(reading: Reading, stated: Mapping[str, Any], factor: float, is_latent: bool) -> dict[str, float]:
    """Return `mscale` and `mscale_all_dim` that multiply queries, keys and scores as the public class does.

    transformers: rotated queries and keys by attention_factor, if stated; else m(mscale) / m(mscale_all_dim), if both
    are stated; else m(1). The scores of latent attention by m(mscale_all_dim)². DeepSeek's own code takes 1 and 0 for
    what is not stated; where both readings differ there is no telling which one the weights were made for.
    """
    mscale = stated_number(reading, stated, "mscale", 1.0)
    over_all = stated_number(reading, stated, "mscale_all_dim", 0.0)
    by_deepseek = magnitude(factor, mscale) / magnitude(factor, over_all)
    by_transformers = by_deepseek if stated.get("mscale") and over_all else magnitude(factor, 1.0)
    is_given = stated.get("attention_factor") is not None
    rotary = stated_number(reading, stated, "attention_factor", by_transformers)
    if is_latent and math.isclose(rotary, by_deepseek, rel_tol=1e-12) and mscale > 0:
        return {"mscale": mscale, "mscale_all_dim": over_all}
    if is_latent and not is_given:
        rule = "readers of this model disagree when only one of mscale and mscale_all_dim is stated"
        reading.refuse("rope_parameters.mscale", rule, "state both, or attention_factor", mscale)
        return {}
    return solve_mscale(reading, rotary, factor, over_all if is_latent else 0.0)


def solve_mscale(reading: Reading, rotary: float, factor: float, over_all: float) -> dict[str, float]:
    """Return the mscale with m(mscale) / m(over_all) = rotary."""
    excess = rotary * magnitude(factor, over_all) - 1.0
    if abs(excess) < 1e-12:
        mscale = 0.0
    elif excess > 0:
        mscale = excess / (magnitude(factor, 1.0) - 1.0)
    else:
        rule = "queries and keys that YaRN makes smaller are not covered"
        reading.refuse("rope_parameters.attention_factor", rule, "choose another model", rotary)
        return {}
    return {"mscale": mscale, "mscale_all_dim": over_all}


def public_rotary(rotary: RotaryConfig, is_latent: bool) -> dict[str, Any]:
    """Return the keys of config.json, for old readers and new ones."""
    scaling = None
    if rotary.yarn is not None:
        scaling = public_yarn(rotary.yarn, is_latent)
    elif rotary.llama3 is not None:
        scaling = public_llama3(rotary.llama3)
    parameters = {"rope_type": "default"} if scaling is None else scaling
    return {
        "rope_theta": rotary.rope_theta,
        # DeepSeek's own code asks for `type`, all others for `rope_type`.
        "rope_scaling": None if scaling is None else {**scaling, "type": scaling["rope_type"]},
        "rope_parameters": {**parameters, "rope_theta": rotary.rope_theta},
    }


def public_llama3(llama3: Llama3Config) -> dict[str, Any]:
    """Return the keys of positions stretched as in Llama 3.1."""
    return {
        "rope_type": "llama3",
        "factor": llama3.factor,
        "original_max_position_embeddings": llama3.original_length,
        "high_freq_factor": llama3.high_freq_factor,
        "low_freq_factor": llama3.low_freq_factor,
    }


def public_yarn(yarn: YarnConfig, is_latent: bool) -> dict[str, Any]:
    """Return the keys of stretched positions.

    attention_factor is stated where the reading of mscale alone would give another magnitude.
    """
    keys: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if not yarn.truncate:
        keys["truncate"] = False
    if is_latent:
        keys |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    is_read_from_both = is_latent and yarn.mscale_all_dim > 0
    if yarn.mscale != 1.0 and not is_read_from_both:
        keys["attention_factor"] = rotary_magnitude(yarn)
    return keys
