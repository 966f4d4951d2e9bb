"""The training loop: steps, records, evaluations, checkpoints, and every way in which it may end."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from moe_train.config.process import settings_message
from moe_train.data.loader import Batch
from moe_train.dist.comm import METER
from moe_train.models.counts import count
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange.choose import choice_for
from moe_train.observe.records import parse_record
from moe_train.observe.sinks import RunContext, SinkGroup, open_sinks
from moe_train.observe.sinks.jsonl import FILE_NAME
from moe_train.ops.loss import IGNORE
from moe_train.training.placement import placement_event
from moe_train.training.saving import save, save_or_report
from moe_train.training.schedule import due, settings_at
from moe_train.training.setup import Run, micro_batch
from moe_train.training.signals import StopRequest
from moe_train.training.speed import memory_gib, model_flops_utilisation
from moe_train.training.step import StepResult, train_step, valid_of
from moe_train.training.tasks.base import Figures


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        step: optimizer steps done.
        signal: the signal that asked to stop; None when the training is complete.
        is_elsewhere: whether only other ranks got that signal.
        final: the figures of the final evaluation; empty when there was none.
    """

    step: int
    signal: int | None
    is_elsewhere: bool
    final: Figures


@dataclass
class Window:
    """Time since the last record."""

    start_s: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    data_wait_s: float = 0.0


class StepSize(NamedTuple):
    """What a step takes, over all ranks and micro-batches."""

    targets: int
    """Labels."""
    tokens: int
    """Tokens, padding excluded."""


def fit(run: Run) -> Outcome:
    """Train from the run's start step to its last, or until a signal. Collective."""
    config = run.config
    context = RunContext(run.folder, config, run.start_step)
    with open_sinks(context, run.world.is_leader) as sinks, StopRequest() as stop, closing(run.saver):
        announce(run, sinks)
        window = Window()
        step, signal = run.start_step, None
        while step < config.train.steps and signal is None:
            batches, size, signal = next_batches(run, stop, window)
            settings = settings_at(step, config, run.texts.tokenizer.boundary_id)
            result = train_step(run.engine, run.mesh, batches, size.targets, settings, size.tokens)
            step += 1
            if run.rebalancer is not None:
                run.rebalancer.observe(result.tally)
            window.steps, window.tokens = window.steps + 1, window.tokens + size.tokens
            if step % config.log.every == 0 or step in (1, config.train.steps):
                sinks.write(train_record(run, step, settings.learning_rate, size.targets, result, window))
                window = Window()
            if due(step, config.eval.every) and step < config.train.steps:
                write_eval(sinks, step, held_out(run, config.eval.batches))
            if due(step, config.checkpoint.every) and step < config.train.steps and signal is None:
                save_or_report(run, step, sinks)
        if step > run.start_step:
            save(run, step, sinks)
        final = held_out(run, None) if signal is None else {}
        if step > run.start_step or not is_evaluated(run.folder, step):
            write_eval(sinks, step, final)
        sinks.close("finished" if signal is None else "interrupted")
    return Outcome(step, signal, stop.signal is None, final)


def write_eval(sinks: SinkGroup, step: int, figures: Figures) -> None:
    """Record an evaluation, if there was one."""
    if figures:
        sinks.write({"kind": "eval", "step": step, **figures})


def is_evaluated(folder: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` holds an evaluation of ``step``: a life that ended after its last save left none."""
    path = folder / FILE_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return any(record["kind"] == "eval" and record["step"] == step for record in map(parse_record, lines) if record)


def announce(run: Run, sinks: SinkGroup) -> None:
    """Record how this life of the run starts."""
    config = run.config.model
    size = count(config, run.texts.tokenizer.vocab_size, run.config.data.seq_len)
    event = "resumed" if run.start_step else "started"
    message = (
        f"{event} at step {run.start_step} on {run.world.size} rank(s) of {run.world.device.type}, "
        f"ep {run.mesh.layout.ep}, {run.accumulation} micro-batch(es) per step; "
        f"{size.total:,} parameters, {size.active:,} active; {run.task.told_size()}"
    )
    sizes = {"parameters": size.total, "active_parameters": size.active}
    sinks.write({"kind": "event", "step": run.start_step, "event": event, "message": message, **sizes})
    told = settings_message(os.environ)
    sinks.write({"kind": "event", "step": run.start_step, "event": "settings", "message": told})
    ffn = config.ffn
    if run.mesh.layout.ep > 1 and ffn.num_experts and ffn.graph is None:
        choice = choice_for(run.mesh.layout, ffn.num_experts, is_padded(ffn.capacity), run.config.parallel, ffn.top_k)
        message = f"exchange {choice.kind}: {choice.reason}"
        sinks.write({"kind": "event", "step": run.start_step, "event": "exchange", "message": message})
    if run.rebalancer is not None:
        state = run.rebalancer.decide(chooses=False).state()
        sinks.write(placement_event(run.start_step, state, "where experts are"))


def next_batches(run: Run, stop: StopRequest, window: Window) -> tuple[list[Batch], StepSize, int | None]:
    """Return this rank's micro-batches, the step's size over all ranks, and the signal that any rank got.

    One sum on the host serves both, so that all ranks stop at the same step without a collective of its own.
    """
    start_s = time.perf_counter()
    batches = run.loader.next_step()
    window.data_wait_s += time.perf_counter() - start_s
    targets = sum(int((batch.labels_BS != IGNORE).sum()) for batch in batches)
    valid = sum(int(valid_of(batch).sum()) for batch in batches)
    sums = torch.tensor([targets, valid, stop.signal or 0, int(stop.signal is not None)], dtype=torch.float64)
    targets, valid, signals, stopped = (int(v) for v in run.world.sum_on_host(sums).tolist())
    return batches, StepSize(targets, valid), signals // stopped if stopped else None


def train_record(
    run: Run, step: int, rate: float, targets: int, result: StepResult, window: Window
) -> dict[str, object]:
    """Return the record of one step; times are means per step since the last record. Collective.

    Matrices between experts stand in the first and the last record, and where there is an evaluation.
    """
    figures = result.tally.measure(targets, run.mesh)
    if not (step in (1, run.config.train.steps) or due(step, run.config.eval.every)):
        figures = without_matrices(figures)
    seconds = time.perf_counter() - window.start_s
    tokens_per_s = window.tokens / seconds
    return {
        "kind": "train",
        "step": step,
        "loss": figures.pop("loss"),
        "aux_loss": figures.pop("aux_loss", None),
        "z_loss": figures.pop("z_loss", None),
        "grad_norm": result.grad_norm.item(),
        "lr": rate,
        "tokens": run.task.tokens_after(step),
        "tokens_per_s": tokens_per_s,
        "step_ms": seconds / window.steps * 1e3,
        "data_wait_ms": window.data_wait_s / window.steps * 1e3,
        "exchange_ms": METER.take_ms() / window.steps,
        "memory_gib": memory_gib(run.world.device),
        "mfu": model_flops_utilisation(run.config, run.texts.tokenizer.vocab_size, run.world, tokens_per_s),
        **figures,
    }


def without_matrices(figures: dict[str, object]) -> dict[str, object]:
    """Return the figures that are numbers or lists: matrices between experts are large, and change slowly."""
    return {key: value for key, value in figures.items() if not is_matrix(value)}


def is_matrix(value: object) -> bool:
    """Whether a figure is a list of lists."""
    return isinstance(value, list) and any(isinstance(row, list) for row in value)


def held_out(run: Run, batches: int | None) -> Figures:
    """Evaluate on ``batches`` global batches of the held-out text, or on all of it. Collective.

    Returns nothing when no text is held out (``data.heldout_fraction=0``).
    """
    limit = None if batches is None else batches * run.accumulation
    return run.task.evaluate(run.engine.model, run.world, run.mesh, micro_batch(run.config, run.world), limit)
