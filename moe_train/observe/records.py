"""Records: the plain mappings that a run writes, one per line of ``metrics.jsonl``, and what is read off them.

A record has ``kind`` (``train``, ``eval`` or ``event``), ``step``, and the keys listed in the documentation of
``metrics.jsonl``. A number that is missing or was not finite is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]

KINDS = ("train", "eval", "event")
LOAD_KEY = re.compile(r"moe/(layer_\d+)/load")


@dataclass(frozen=True)
class ExpertHealth:
    """State of all MoE layers at one step; a field is None when the record has no finite value for it.

    Attributes:
        imbalance: the worst layer's largest expert load over its mean load; 1.0 is balanced.
        worst_layer: name of that layer, for example ``layer_03``.
        dead_experts: experts without a token, summed over layers.
        dropped_fraction: mean over layers of the share of assignments that were dropped.
        entropy: mean over layers of the router's entropy, in nats.
    """

    imbalance: float | None
    worst_layer: str
    dead_experts: int | None
    dropped_fraction: float | None
    entropy: float | None


def finite(value: object) -> float | None:
    """Return ``value`` as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def moe_layers(record: Record) -> list[str]:
    """Return the names of the MoE layers in ``record``, in order: ``["layer_01", "layer_03"]``."""
    return sorted(match[1] for key in record if (match := LOAD_KEY.fullmatch(key)))


def load_imbalance(load: object) -> float | None:
    """Return the largest over the mean of the experts' loads, or None when they are missing, not finite or all zero.

    Args:
        load: list with each expert's share of the layer's assignments.
    """
    if not isinstance(load, Sequence):
        return None
    shares = [share for share in map(finite, load) if share is not None]
    if len(shares) < len(load) or not sum(shares) > 0:
        return None
    return max(shares) * len(shares) / sum(shares)


def expert_health(record: Record) -> ExpertHealth | None:
    """Return the state of the MoE layers of a train record, or None when it has none."""
    layers = moe_layers(record)
    if not layers:
        return None

    def values(name: str) -> list[float]:
        found = (finite(record.get(f"moe/{layer}/{name}")) for layer in layers)
        return [value for value in found if value is not None]

    imbalances = {layer: load_imbalance(record[f"moe/{layer}/load"]) or 0.0 for layer in layers}
    worst = max(imbalances, key=lambda layer: imbalances[layer])
    dead, dropped, entropy = values("dead_experts"), values("dropped_fraction"), values("entropy")
    return ExpertHealth(
        imbalance=imbalances[worst] or None,
        worst_layer=worst,
        dead_experts=int(sum(dead)) if dead else None,
        dropped_fraction=sum(dropped) / len(dropped) if dropped else None,
        entropy=sum(entropy) / len(entropy) if entropy else None,
    )


def to_json(record: Record) -> str:
    """Return ``record`` as one line of valid JSON, ASCII only; numbers that are not finite become null."""
    return json.dumps(_without_nan(record), allow_nan=False)


def parse_record(line: str) -> dict[str, Any] | None:
    """Return the record on ``line``, or None when the line is torn or no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("step"), int):
        return None
    return record


def _without_nan(value: Any) -> Any:
    """Return ``value`` with every number that is not finite replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
