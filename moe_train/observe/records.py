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
LAYER_NAME = re.compile(r"layer_(?P<depth>\d+)(?:_(?P<part>\w+))?")
"""Of a block: ``layer_03`` is its feed-forward part, ``layer_03_values`` another that leaves a record."""
ROUTED = "load"
"""The figure that every layer with a router over experts has, and no other."""
COUPLED = "similarity"
"""The figure that every layer of experts coupled by a graph has, and no other."""
DEEP = "chosen_share"
"""The figure that every block has which only some tokens pass, and nothing else."""
HEAD = "head"
"""The part that a classifier's head with experts is; it stands with the feed-forward layers."""


@dataclass(frozen=True)
class ExpertHealth:
    """State of routed layers at one step; a field is None when the record has no finite value for it.

    Attributes:
        imbalance: the worst layer's largest expert load over its mean load; 1.0 is balanced.
        worst_layer: name of that layer, for example ``layer_03`` or ``layer_03_values``.
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


@dataclass(frozen=True)
class DepthHealth:
    """State of all blocks that only some tokens pass, at one step; a field is None when no record has a value for it.

    Attributes:
        chosen_share: share of the tokens that passed in training, mean over blocks.
        causal_share: share that would have passed by the choice without later tokens, mean over blocks.
        causal_accuracy: share of the tokens for which both choices agree, in the block where it is lowest.
        worst_layer: name of that block's record, for example ``layer_03_depth``.
    """

    chosen_share: float | None
    causal_share: float | None
    causal_accuracy: float | None
    worst_layer: str


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


def feed_forward(layers: Iterable[str]) -> list[str]:
    """Return the names of those layers that are the feed-forward part of their block, or the head of a classifier."""
    return [layer for layer in layers if part_of(layer) in ("", HEAD)]


def attending(layers: Iterable[str]) -> list[str]:
    """Return the names of those layers that are another part: with a router, the values or the outputs of attention."""
    return [layer for layer in layers if part_of(layer) not in ("", HEAD)]


def part_of(layer: str) -> str:
    """Return which part of its block a layer is: nothing for the feed-forward part, else ``values``, ``depth``, ..."""
    named = LAYER_NAME.fullmatch(layer)
    return (named["part"] or "") if named else ""


def layer_title(layer: str) -> str:
    """Return the name of a layer as readers see it: ``layer 3``, ``layer 3, values``, ``head``."""
    named = LAYER_NAME.fullmatch(layer)
    if named is None:
        return layer.replace("_", " ")
    part = named["part"] or ""
    if part == HEAD:
        return HEAD
    return f"layer {int(named['depth'])}" + (f", {part.replace('_', ' ')}" if part else "")


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
    """Return the state of the routed feed-forward layers of a train record, or None when it has none."""
    return routed_health(record, feed_forward(moe_layers(record, ROUTED)))


def attention_health(record: Record) -> ExpertHealth | None:
    """Return the state of the routed parts of attention of a train record, or None when it has none."""
    return routed_health(record, attending(moe_layers(record, ROUTED)))


def routed_health(record: Record, layers: Sequence[str]) -> ExpertHealth | None:
    """Return the state of some routed layers together, or None of nothing."""
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


def depth_health(record: Record) -> DepthHealth | None:
    """Return the state of the blocks that only some tokens pass, or None when a train record has none."""
    layers = moe_layers(record, DEEP)
    if not layers:
        return None
    known = {layer: found[0] for layer in layers if (found := layer_values(record, [layer], "causal_accuracy"))}
    worst = min(known, key=lambda layer: known[layer], default=layers[0])
    return DepthHealth(
        chosen_share=mean(layer_values(record, layers, DEEP)),
        causal_share=mean(layer_values(record, layers, "causal_share")),
        causal_accuracy=known.get(worst),
        worst_layer=worst,
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
