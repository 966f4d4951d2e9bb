"""The card on top of the report: what the run reached, how far it got, what it cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_train.observe.records import Record, finite
from moe_train.observe.report.record import RunRecord
from moe_train.observe.sinks.lines import count, duration


@dataclass(frozen=True)
class Tile:
    """One figure of the card.

    Attributes:
        label: what it is.
        value: the number with its unit.
        note: what to compare it with; may be empty.
    """

    label: str
    value: str
    note: str = ""


def tiles(run: RunRecord) -> list[Tile]:
    """Return the figures of the card that the run has."""
    candidates = (
        accuracy(run),
        heldout_loss(run),
        bits_per_byte(run),
        progress(run),
        tokens(run),
        time(run),
        parameters(run),
    )
    return [tile for tile in candidates if tile is not None]


def accuracy(run: RunRecord) -> Tile | None:
    """Return the last held-out accuracy of a classifier beside that of always telling the largest class."""
    last = next((record for record in reversed(run.evals) if finite(record.get("accuracy")) is not None), None)
    if last is None:
        return None
    majority, f1 = finite(last.get("majority")), finite(last.get("macro_f1"))
    notes = [f"macro-F1 {f1:.3f}" if f1 is not None else "", f"majority {majority:.1%}" if majority is not None else ""]
    return Tile("Accuracy", f"{last['accuracy']:.1%}", "; ".join(note for note in notes if note))


def heldout_loss(run: RunRecord) -> Tile | None:
    """Return the last held-out loss with its perplexity."""
    last = next((record for record in reversed(run.evals) if finite(record.get("loss")) is not None), None)
    if last is None:
        return None
    perplexity = finite(last.get("perplexity"))
    note = f"nats per {run.loss_unit} at step {last['step']}" + (f"; perplexity {perplexity:.1f}" if perplexity else "")
    return Tile("Held-out loss", f"{last['loss']:.3f}", note + looking_ahead(last, "loss"))


def bits_per_byte(run: RunRecord) -> Tile | None:
    """Return the last held-out bits per byte beside those of a unigram model."""
    last = next((record for record in reversed(run.evals) if finite(record.get("bits_per_byte")) is not None), None)
    if last is None:
        return None
    unigram = finite(last.get("unigram_bits_per_byte"))
    note = f"a unigram model needs {unigram:.3f}" if unigram is not None else "held-out text"
    return Tile("Bits per byte", f"{last['bits_per_byte']:.3f}", note + looking_ahead(last, "bits_per_byte"))


def looking_ahead(record: Record, name: str) -> str:
    """Return what a note adds where the evaluation also measured a figure with choices that know later tokens."""
    value = finite(record.get(f"{name}_looking_ahead"))
    return "" if value is None else f"; {value:.3f} if choices see later tokens"


def progress(run: RunRecord) -> Tile | None:
    """Return how many optimizer steps are done, of how many."""
    done = max((record["step"] for record in (*run.train, *run.evals)), default=None)
    if done is None:
        return None
    total = run.setting("train.steps")
    if not isinstance(total, int):
        return Tile("Steps", f"{done:,}")
    return Tile("Steps", f"{done:,}", "complete" if done >= total else f"of {total:,}; not complete")


def tokens(run: RunRecord) -> Tile | None:
    """Return the tokens trained on, and the usual rate."""
    seen, rate = run.train_series("tokens"), run.train_series("tokens_per_s")
    if not seen:
        return None
    note = f"{count(float(np.nanmedian(rate.values)))} per second (median)" if rate else ""
    return Tile("Tokens", count(float(np.nanmax(seen.values))), note)


def time(run: RunRecord) -> Tile | None:
    """Return the time spent in training steps: their mean time, times the steps that each record stands for."""
    step = run.train_series("step_ms")
    if not step:
        return None
    seconds = float(np.nansum(np.diff(step.steps, prepend=0) * step.values)) / 1000
    return Tile("Time in steps", duration(seconds), "without start, evaluation and saving")


def parameters(run: RunRecord) -> Tile | None:
    """Return the model's size, which the run tells in an event with ``parameters`` and ``active_parameters``."""
    told = next((event for event in reversed(run.events) if finite(event.get("parameters")) is not None), None)
    if told is None:
        return None
    active = finite(told.get("active_parameters"))
    return Tile("Parameters", count(told["parameters"]), f"{count(active)} active per token" if active else "")
