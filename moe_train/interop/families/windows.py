"""Attention windows: which layers of a public class have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import ModelConfig
from moe_train.interop.families.base import Reading
from moe_train.models.attention import window_of

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(reading: Reading, window: int | None, types: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the keys of attention windows.

    Args:
        reading: config.json.
        window: positions that the layers with a window see.
        types: of the layers; None: all have the window, if there is one.
    """
    layers = reading.integer("num_hidden_layers")
    computed = list(types or [FULL if window is None else SLIDING] * layers)
    if list(reading.get("layer_types") or computed) != computed:
        reading.refuse("layer_types", "this class has the same attention in all layers", "correct it or leave it out")
    if set(computed) == {FULL}:
        return {}
    full_every = period(computed)
    if full_every is None or len(computed) != layers:
        rule = "not a pattern with full attention in the last of each n layers"
        reading.refuse("layer_types", rule, "choose another model", ",".join(computed))
        return {}
    return {"window": window, "full_every": full_every or None}


def period(types: Sequence[str]) -> int | None:
    """Return n where exactly the last of each n layers sees all positions; 0: none does; None: no such pattern."""
    if any(kind not in (FULL, SLIDING) for kind in types):
        return None
    if FULL not in types:
        return 0
    every = types.index(FULL) + 1
    matches = all((kind == FULL) == ((layer + 1) % every == 0) for layer, kind in enumerate(types))
    return every if matches else None


def public_types(model: ModelConfig) -> list[str]:
    """Return the types of a model's layers."""
    assert isinstance(model.attention, GroupedQueryConfig), "refused models are not translated"
    attention = model.attention
    return [FULL if window_of(attention, layer) is None else SLIDING for layer in range(model.layers)]
