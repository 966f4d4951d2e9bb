"""Records as lines of plain text: ``step 120/1000 12% | loss 3.412 (ema 3.45) | ... | eta 14m``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moe_train.config.schema import TrainConfig
from moe_train.observe.records import (
    DepthHealth,
    ExpertHealth,
    GraphHealth,
    Record,
    attention_health,
    depth_health,
    expert_health,
    finite,
    graph_health,
)

NONE = "-"
LEGEND = (
    "tok/s: tokens per second over all ranks | mfu: share of peak FLOP/s | mem: peak GiB | data: share of step waiting "
    "for data"
)
ROUTED_LEGEND = " | imb: worst layer's max/mean expert load | drop: assignments dropped"
GRAPH_LEGEND = (
    " | sim: worst layer's mean cosine between experts | rank: effective rank of the experts | msg: norm of the "
    "messages relative to what an expert sends"
)
ATTENTION_LEGEND = " | attn: load of the experts in attention, worst layer's max/mean"
DEPTH_LEGEND = (
    " | passed: tokens that took the blocks which only some take | causal: those that would have without later tokens "
    "| agree: tokens for which both are the same, in the worst block"
)


@dataclass(frozen=True)
class Progress:
    """What the console knows beyond the newest train record.

    Attributes:
        total_steps: optimizer steps of the whole run.
        loss_ema: smoothed loss in nats per token; None before the first finite one.
        remaining_s: estimated time to the last step, in seconds; None during warm-up.
    """

    total_steps: int
    loss_ema: float | None
    remaining_s: float | None


class ToldHealth(NamedTuple):
    """The state of one kind of layers, in short."""

    kind: str
    """Of the layers: ``experts``, ``attention`` or ``depth``."""
    text: str
    """Its fields."""
    worst_layer: str
    """Name of the layer that a reader should look at."""


def train_line(record: Record, progress: Progress) -> str:
    """Return the line of a train record."""
    step, total = record["step"], progress.total_steps
    ema = number(progress.loss_ema, ".2f")
    parts = [
        f"step {step}/{total} {step / total:.0%}",
        f"loss {number(record.get('loss'), '.3f')} (ema {ema})",
        f"gnorm {number(record.get('grad_norm'), '.2f')}",
        f"lr {number(record.get('lr'), '.1e')}",
        f"{count(record.get('tokens_per_s'))} tok/s",
        f"mfu {percent(record.get('mfu'))}",
        f"mem {number(record.get('memory_gib'), '.1f')}G",
        f"data {percent(data_share(record))}",
    ]
    parts += [health.text for health in told_health(record)]
    parts.append(f"eta {duration(progress.remaining_s)}")
    return " | ".join(parts)


def eval_line(record: Record) -> str:
    """Return the line of an eval record."""
    loss = f"loss {number(record.get('loss'), '.3f')}"
    if "loss_looking_ahead" in record:
        loss += f" (looking ahead {number(record['loss_looking_ahead'], '.3f')})"
    parts = [f"eval step {record['step']}", loss]
    if "accuracy" in record:
        return " | ".join([*parts, *told_classes(record)])
    parts.append(f"perplexity {number(record.get('perplexity'), '.2f')}")
    if "bits_per_byte" in record:
        parts.append(f"{number(record['bits_per_byte'], '.3f')} bits/byte")
    if "unigram_bits_per_byte" in record:
        parts[-1] += f" (unigram {number(record['unigram_bits_per_byte'], '.3f')})"
    return " | ".join(parts)


def told_classes(record: Record) -> list[str]:
    """Return the fields of an eval record of a classifier, beside the accuracy of always telling the largest class."""
    accuracy, majority = percent(record["accuracy"], ".1%"), percent(record.get("majority"), ".1%")
    return [f"accuracy {accuracy} (majority {majority})", f"macro-F1 {number(record.get('macro_f1'), '.3f')}"]


def event_line(record: Record) -> str:
    """Return the line of an event; characters that would steer a terminal are taken out of its message."""
    parts = [f"event step {record['step']}", str(record.get("event", "")), str(record.get("message", ""))]
    return printable(" | ".join(part for part in parts if part))


def legend(config: TrainConfig) -> str:
    """Return what the fields of the run's train lines mean."""
    model = config.model
    fields = ROUTED_LEGEND if model.ffn.graph is None else GRAPH_LEGEND
    fields += ATTENTION_LEGEND if model.attention.kind == "switchhead" else ""
    return LEGEND + fields + (DEPTH_LEGEND if model.depth.kind == "mixture_of_depths" else "")


def told_health(record: Record) -> list[ToldHealth]:
    """Return the state of each kind of layers that a train record speaks of."""
    told = []
    if (experts := expert_health(record) or graph_health(record)) is not None:
        told.append(ToldHealth("experts", health_text(experts), experts.worst_layer))
    if (attention := attention_health(record)) is not None:
        told.append(ToldHealth("attention", attention_text(attention), attention.worst_layer))
    if (depth := depth_health(record)) is not None:
        told.append(ToldHealth("depth", depth_text(depth), depth.worst_layer))
    return told


def health_text(health: ExpertHealth | GraphHealth) -> str:
    """Return the short fields of the experts' state."""
    if isinstance(health, GraphHealth):
        similarity, rank = number(health.similarity, ".2f"), number(health.effective_rank, ".2f")
        return f"sim {similarity} rank {rank} msg {number(health.message_norm, '.2f')}"
    dead = NONE if health.dead_experts is None else health.dead_experts
    return f"imb {number(health.imbalance, '.2f')} dead {dead} drop {percent(health.dropped_fraction, '.1%')}"


def attention_text(health: ExpertHealth) -> str:
    """Return the short fields of attention's experts, of which nothing is dropped."""
    dead = NONE if health.dead_experts is None else health.dead_experts
    return f"attn {number(health.imbalance, '.2f')} dead {dead}"


def depth_text(health: DepthHealth) -> str:
    """Return the short fields of the blocks that only some tokens pass."""
    passed, causal = percent(health.chosen_share, ".1%"), percent(health.causal_share, ".1%")
    return f"passed {passed} causal {causal} agree {percent(health.causal_accuracy)}"


def data_share(record: Record) -> float | None:
    """Return the share of the step's time that waited for data, 0 to 1, or None when not measured."""
    wait, step = finite(record.get("data_wait_ms")), finite(record.get("step_ms"))
    return wait / step if wait is not None and step else None


def number(value: object, spec: str) -> str:
    """Return ``value`` in format ``spec``; ``-`` when it is absent or not finite."""
    real = finite(value)
    return NONE if real is None else format(real, spec)


def percent(value: object, spec: str = ".0%") -> str:
    """Return a fraction as a percentage; ``-`` when it is absent or not finite."""
    return number(value, spec)


def count(value: object) -> str:
    """Return a quantity with three digits and a unit prefix: ``41.2k``, ``1.25M``; ``-`` when absent."""
    real = finite(value)
    if real is None:
        return NONE
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if real >= limit:
            return f"{real / limit:.3g}{suffix}"
    return f"{real:.0f}"


def duration(seconds: float | None) -> str:
    """Return a time in its leading units: ``45s``, ``3m20s``, ``14m``, ``2h05m``, ``3d04h``; ``-`` when unknown."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d{hours % 24:02d}h"


def printable(text: str) -> str:
    """Return ``text`` on one line, without control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
