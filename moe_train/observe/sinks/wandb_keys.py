"""Records under the keys that Weights & Biases shows: groups of a few numbers, and no list."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.observe.records import (
    COUPLED,
    DEEP,
    ROUTED,
    ExpertHealth,
    Record,
    attending,
    attention_health,
    depth_health,
    expert_health,
    feed_forward,
    finite,
    graph_health,
    load_imbalance,
    moe_layers,
)

TRAIN_KEYS = {
    "loss": "train/loss",
    "mtp_loss": "train/mtp_loss",
    "aux_loss": "train/aux_loss",
    "z_loss": "train/z_loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_s": "perf/tok_s",
    "step_ms": "perf/step_ms",
    "data_wait_ms": "perf/data_ms",
    "exchange_ms": "perf/a2a_ms",
    "mfu": "perf/mfu",
    "memory_gib": "mem/peak_gib",
}


def wandb_values(record: Record) -> dict[str, float]:
    """Return the finite numbers of ``record`` under their wandb keys; nothing for an event."""
    if record["kind"] == "event":
        return {}
    if record["kind"] == "eval":
        named = {f"val/{key}": value for key, value in record.items() if key not in ("kind", "step")}
    else:
        named = {TRAIN_KEYS.get(key, f"train/{key}"): value for key, value in record.items() if _is_own(key)}
        named |= _routed_values(record, "moe", expert_health(record), feed_forward(moe_layers(record, ROUTED)))
        named |= _routed_values(record, "attention", attention_health(record), attending(moe_layers(record, ROUTED)))
        named |= _graph_values(record) | _depth_values(record)
    return {key: number for key, value in named.items() if (number := finite(value)) is not None}


def _is_own(key: str) -> bool:
    """Return whether a train record's ``key`` is logged as it stands; those of the MoE layers are summed up."""
    return key not in ("kind", "step") and not key.startswith("moe/")


def _routed_values(record: Record, group: str, health: ExpertHealth | None, layers: Sequence[str]) -> dict[str, object]:
    """Return the state of routed experts: four keys for the model and two per layer, all of a ``group``."""
    if health is None:
        return {}
    values: dict[str, object] = {
        f"{group}/imbalance": health.imbalance,
        f"{group}/dead": health.dead_experts,
        f"{group}/drop_frac": health.dropped_fraction,
        f"{group}/entropy": health.entropy,
    }
    for layer in layers:
        values[f"{group}/{_short(layer)}/load_max"] = load_imbalance(record[f"moe/{layer}/{ROUTED}"])
        values[f"{group}/{_short(layer)}/entropy"] = record.get(f"moe/{layer}/entropy")
    return values


def _graph_values(record: Record) -> dict[str, object]:
    """Return the state of graph-coupled experts: four keys for the model and two per layer, and no matrix."""
    health = graph_health(record)
    if health is None:
        return {}
    values: dict[str, object] = {
        "moe/similarity": health.similarity,
        "moe/effective_rank": health.effective_rank,
        "moe/message_norm": health.message_norm,
        "moe/adjacency_entropy": health.adjacency_entropy,
    }
    for layer in moe_layers(record, COUPLED):
        values[f"moe/{_short(layer)}/similarity"] = record[f"moe/{layer}/{COUPLED}"]
        values[f"moe/{_short(layer)}/effective_rank"] = record.get(f"moe/{layer}/effective_rank")
    return values


def _depth_values(record: Record) -> dict[str, object]:
    """Return the state of blocks that only some tokens pass: three keys for the model and two per block."""
    health = depth_health(record)
    if health is None:
        return {}
    values: dict[str, object] = {
        "depth/chosen_share": health.chosen_share,
        "depth/causal_share": health.causal_share,
        "depth/causal_accuracy": health.causal_accuracy,
    }
    for layer in moe_layers(record, DEEP):
        short = _short(layer).removesuffix("_depth")
        values[f"depth/{short}/causal_share"] = record.get(f"moe/{layer}/causal_share")
        values[f"depth/{short}/causal_accuracy"] = record.get(f"moe/{layer}/causal_accuracy")
    return values


def _short(layer: str) -> str:
    return layer.replace("layer_", "L")
