"""Saves beside the training: it waits for a copy in the host's memory, and not for the disk.

The thread that writes runs the very code of a save in the foreground, over a group of processes of its own; so what is
promised of crashes holds for it too. The optimizer may change the weights in place meanwhile: the copy is of the step
that was asked for.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.parts import Box, Part
from moe_train.errors import CheckpointError

GRACE_S = 3.0
"""For a save under way when the run ends with an error: the ranks must not outlive it for long."""


@dataclass(frozen=True)
class Saved:
    """A save that has ended well.

    Attributes:
        step: optimizer steps done.
        path: folder of the checkpoint.
        stall_ms: what the training waited for: an earlier save, and the copy or the whole.
        total_ms: from the call until it was published and older ones pruned.
    """

    step: int
    path: Path
    stall_ms: float
    total_ms: float


class Saver(Protocol):
    """Publishes checkpoints. All ranks call its methods at the same points; what it raises it raises on all.

    Attributes:
        step: of the newest save, whether it has ended or not, well or not; None before the first.
    """

    step: int | None

    def save(self, step: int, state: CheckpointState) -> Saved | None:
        """Publish a checkpoint; None: it is on its way, see `wait`."""

    def wait(self) -> Saved | None:
        """Return how a save ended that was on its way; None when there was none."""

    def close(self) -> None:
        """End the saver of a run that has failed, in bounded time; a save under way may be lost."""


class ForegroundSaver:
    """Saves while the training waits.

    Args:
        manager: of the run's checkpoints.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self.step: int | None = None

    def save(self, step: int, state: CheckpointState) -> Saved:
        """Publish a checkpoint. Collective.

        Raises:
            CheckpointError: on all ranks; earlier checkpoints are as they were.
        """
        start_s = time.perf_counter()
        self.step = step
        path = self.manager.save(step, state)
        total_ms = (time.perf_counter() - start_s) * 1e3
        return Saved(step, path, total_ms, total_ms)

    def wait(self) -> None:
        """Do nothing: a save has ended when it returns."""

    def close(self) -> None:
        """Do nothing."""


class BackgroundSaver:
    """Saves while the training goes on; one save at a time. Collective.

    Each rank keeps a copy of all that it holds in the host's memory, from its first save on.

    Args:
        manager: of the run's checkpoints, which has looked for one to resume from; not to be used for saving any more.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager.in_background()
        self.staging = Staging()
        self.step: int | None = None
        self.under_way: Future[Saved] | None = None

    def save(self, step: int, state: CheckpointState) -> None:
        """Copy the state and begin to write it. Collective.

        Waits first for the save that is under way, if there is one.

        Raises:
            CheckpointError: on all ranks, when that earlier save failed, and nobody has waited for it: this one is not
                begun. Earlier checkpoints are as they were.
        """
        start_s = time.perf_counter()
        self.wait()
        self.step = step
        copied = replace(state, parts=self.staging.copy(state.parts), trainer=copy.deepcopy(state.trainer))
        stall_ms = (time.perf_counter() - start_s) * 1e3

        def publish() -> Saved:
            if self.manager.world.device.type != "cpu":
                # A thread begins with the first device, where torch's writer would make a context of its own.
                torch.accelerator.set_device_index(self.manager.world.device)
            path = self.manager.save(step, copied)
            return Saved(step, path, stall_ms, (time.perf_counter() - start_s) * 1e3)

        self.under_way = in_thread(publish, f"save of step {step}")

    def wait(self) -> Saved | None:
        """Wait until the save under way is published and return it; None when there is none. All ranks call it alike.

        Raises:
            CheckpointError: on all ranks, when it failed; earlier checkpoints are as they were. Told once.
        """
        if self.under_way is None:
            return None
        ended, self.under_way = self.under_way, None
        try:
            return ended.result()
        except CheckpointError as error:
            raise CheckpointError(error.problems) from error

    def close(self) -> None:
        """Give a save that is under way a last moment: one that waits for a lost rank would wait for long."""
        if self.under_way is not None:
            with contextlib.suppress(BaseException):  # the run ends with another error, which must be seen
                self.under_way.exception(timeout=GRACE_S)
            self.under_way = None

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.wait()
        else:
            self.close()


def in_thread(work: Callable[[], Saved], name: str) -> Future[Saved]:
    """Run ``work`` in a thread that does not keep the process alive, as those of an executor do."""
    future: Future[Saved] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # torch's CheckpointException is no Exception
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Staging:
    """Copies of boxes in the host's memory, which are used again from save to save.

    Attributes:
        buffers: the copies, by key and place in the whole tensor.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Return the parts with their present values, on the host. The earlier copy must not be in use any more.

        Returns when the values are there: what is done to the originals from now on does not reach the copy.
        """
        earlier, self.buffers = self.buffers, {}
        copied = {}
        for key, part in parts.items():
            boxes = []
            for box in part.boxes:
                buffer = earlier.get((key, box.offsets))
                if buffer is None or not is_room_for(buffer, box.values):
                    # From pinned memory an accelerator copies by itself, several times as fast.
                    on_device = box.values.device.type != "cpu"
                    buffer = torch.empty(box.values.shape, dtype=box.values.dtype, pin_memory=on_device)
                self.buffers[key, box.offsets] = buffer
                boxes.append(Box(buffer.copy_(box.values.detach(), non_blocking=True), box.offsets))
            copied[key] = Part(part.shape, tuple(boxes))
        for device in {box.values.device for part in parts.values() for box in part.boxes}:
            if device.type != "cpu":
                torch.accelerator.current_stream(device).synchronize()
        return copied


def is_room_for(buffer: Tensor, values: Tensor) -> bool:
    """Whether a buffer of an earlier save fits the values."""
    return buffer.shape == values.shape and buffer.dtype == values.dtype
