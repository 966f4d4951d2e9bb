"""Records: the plain mappings that a run writes, one per line of ``metrics.jsonl``, and what is read off them.

A record has ``kind`` (``train``, ``eval`` or ``event``), ``step``, and the keys listed in the documentation of
``metrics.jsonl``. A number that is missing or was not finite is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]

KINDS = ("train", "eval", "event")
LAYER_KEY = re.compile(r"moe/(layer_\d+\w*)/(\w+)")
ROUTED = "load"
"""The figure that every layer with a router has, and no other."""
COUPLED = "similarity"
"""The figure that every layer of experts coupled by a graph has, and no other."""


@dataclass(frozen=True)
class ExpertHealth:
    """State of all routed layers at one step; a field is None when the record has no finite value for it.

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


@dataclass(frozen=True)
class GraphHealth:
    """State of all graph-coupled layers at one step; a field is None when the record has no finite value for it.

    Attributes:
        similarity: the mean cosine between what two experts add, in the layer where it is largest; 1.0 is collapse.
        worst_layer: name of that layer.
        effective_rank: mean over layers of the effective rank of the experts' cosines, 1 to E.
        message_norm: norm of the received messages relative to what an expert sends, mean over layers and graph layers.
        adjacency_entropy: mean over layers of the entropy of an expert's sources, in nats.
    """

    similarity: float | None
    worst_layer: str
    effective_rank: float | None
    message_norm: float | None
    adjacency_entropy: float | None


def finite(value: object) -> float | None:
    """Return ``value`` as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def moe_layers(keys: Iterable[str], figure: str) -> list[str]:
    """Return the names of the layers that ``figure`` is told of, in order: ``["layer_01", "layer_03"]``.

    Args:
        keys: those of one or more records.
        figure: ``ROUTED``, ``COUPLED``, or any other.
    """
    matches = (LAYER_KEY.fullmatch(key) for key in keys)
    return sorted({match[1] for match in matches if match and match[2] == figure})


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
    """Return the state of the routed layers of a train record, or None when it has none."""
    layers = moe_layers(record, ROUTED)
    if not layers:
        return None
    imbalances = {layer: load_imbalance(record[f"moe/{layer}/{ROUTED}"]) or 0.0 for layer in layers}
    worst = max(imbalances, key=lambda layer: imbalances[layer])
    dead = layer_values(record, layers, "dead_experts")
    return ExpertHealth(
        imbalance=imbalances[worst] or None,
        worst_layer=worst,
        dead_experts=int(sum(dead)) if dead else None,
        dropped_fraction=mean(layer_values(record, layers, "dropped_fraction")),
        entropy=mean(layer_values(record, layers, "entropy")),
    )


def graph_health(record: Record) -> GraphHealth | None:
    """Return the state of the graph-coupled layers of a train record, or None when it has none."""
    layers = moe_layers(record, COUPLED)
    if not layers:
        return None
    known = {layer: value for layer in layers if (value := finite(record[f"moe/{layer}/{COUPLED}"])) is not None}
    worst = max(known, key=lambda layer: known[layer], default=layers[0])
    return GraphHealth(
        similarity=known.get(worst),
        worst_layer=worst,
        effective_rank=mean(layer_values(record, layers, "effective_rank")),
        message_norm=mean(layer_values(record, layers, "message_norm")),
        adjacency_entropy=mean(layer_values(record, layers, "adjacency_entropy")),
    )


def layer_values(record: Record, layers: Iterable[str], figure: str) -> list[float]:
    """Return the finite values of a figure over the layers; one that is a list gives all of its entries."""
    found: list[object] = []
    for layer in layers:
        value = record.get(f"moe/{layer}/{figure}")
        found += value if isinstance(value, list) else [value]
    return [real for value in found if (real := finite(value)) is not None]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of nothing."""
    return sum(values) / len(values) if values else None


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
