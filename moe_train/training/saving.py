"""The checkpoints of a run: what goes into them, what is recorded of them, and what may move afterwards."""

from __future__ import annotations

import time
from typing import Any

from moe_train.checkpoint.background import Saved
from moe_train.checkpoint.reader import open_checkpoint
from moe_train.checkpoint.state import CheckpointState
from moe_train.errors import CheckpointError
from moe_train.observe.sinks import SinkGroup
from moe_train.training.placement import Decision
from moe_train.training.random import random_state
from moe_train.training.schedule import due
from moe_train.training.setup import Run, identity


def save(run: Run, step: int, sinks: SinkGroup) -> None:
    """Publish a run's last checkpoint, and wait until it is there. Collective.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints are intact.
    """
    settle_or_report(run, sinks)
    is_due = due(step, run.config.checkpoint.every)
    publish(run, step, sinks, None if run.rebalancer is None else run.rebalancer.decide(is_due))
    settle(run, sinks)


def publish(run: Run, step: int, sinks: SinkGroup, decision: Decision | None) -> Saved | None:
    """Publish a checkpoint, or begin to: then None. Collective. Errors as in `save`."""
    start_s = time.perf_counter()
    trainer = {
        "step": step,
        "loader": run.loader.state_dict(),
        "identity": identity(run.config, run.texts),
        "layout": layout_of(run) | ({} if decision is None else decision.state()),
    }
    saved = run.saver.save(step, CheckpointState(run.engine.parts(), trainer, random_state(run.world.device)))
    stall_ms = (time.perf_counter() - start_s) * 1e3
    event, what = ("saved", f"saved {saved.path}") if saved else ("saving", f"copied step {step} to be saved")
    sinks.write(
        {"kind": "event", "step": step, "event": event, "message": f"{what} in {stall_ms:.0f} ms", "stall_ms": stall_ms}
    )
    return saved


def layout_of(run: Run) -> dict[str, Any]:
    """Return the layout that writes a checkpoint, for those who look into it: any other may read it."""
    parallel = run.config.parallel
    layout = {"world_size": run.world.size, "ep": parallel.ep, "dp_shard": parallel.dp_shard, "engine": parallel.engine}
    return layout | ({"zero_stage": parallel.zero_stage} if parallel.engine == "deepspeed" else {})


def move_experts(run: Run, step: int, sinks: SinkGroup, decision: Decision, saved: Saved) -> None:
    """Bring experts to the places decided on, from the checkpoint just published. Collective.

    Raises:
        CheckpointError: on all ranks; the state is undefined, and the run has to end.
    """
    if run.rebalancer is None or not decision.starts_anew:
        return
    start_s = time.perf_counter()
    read = run.rebalancer.carry_out(decision, open_checkpoint(saved.path, run.world) if decision.moves else None)
    stall_ms = (time.perf_counter() - start_s) * 1e3
    sinks.write(decision.event(step) | {"bytes_read": read, "stall_ms": stall_ms})


def save_or_report(run: Run, step: int, sinks: SinkGroup) -> None:
    """Publish a checkpoint, or say why not and go on: a full disk must not cost the run, which has older ones."""
    settle_or_report(run, sinks)
    decision = None if run.rebalancer is None else run.rebalancer.decide(chooses=True)
    try:
        saved = publish(run, step, sinks, decision)
    except CheckpointError as error:
        report(error, step, sinks)
        return
    if decision is not None and saved is not None:
        move_experts(run, step, sinks, decision, saved)


def settle(run: Run, sinks: SinkGroup) -> None:
    """Wait for the save that goes on beside the training, if there is one. Collective.

    Raises:
        CheckpointError: on all ranks; earlier checkpoints are intact.
    """
    saved = run.saver.wait()
    if saved is not None:
        message = f"saved {saved.path} in {saved.total_ms:.0f} ms, of which {saved.stall_ms:.0f} ms for a copy"
        times = {"stall_ms": saved.stall_ms, "total_ms": saved.total_ms}
        sinks.write({"kind": "event", "step": saved.step, "event": "saved", "message": message, **times})


def settle_or_report(run: Run, sinks: SinkGroup) -> None:
    """Wait for the save that goes on beside the training; if it failed, say so and go on."""
    step = run.saver.step
    try:
        settle(run, sinks)
    except CheckpointError as error:
        report(error, step or 0, sinks)


def report(error: CheckpointError, step: int, sinks: SinkGroup) -> None:
    """Record that a save failed."""
    sinks.write({"kind": "event", "step": step, "event": "save failed", "message": error.report()})
