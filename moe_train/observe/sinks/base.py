"""What a sink is, and what it is told about the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from moe_train.config.schema import TrainConfig
from moe_train.observe.records import Record

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunContext:
    """The run that the records belong to.

    Attributes:
        run_dir: folder of the run.
        config: validated configuration; it holds no secrets, its schema has no key for one.
        start_step: optimizer steps already done: 0, or the step of the checkpoint that this life goes on from.
    """

    run_dir: Path
    config: TrainConfig
    start_step: int


class Sink(Protocol):
    """A place that records are written to. Any method may raise; the group that owns the sink then drops it."""

    name: str

    def start(self, context: RunContext) -> None:
        """Make ready for the records after ``context.start_step``."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self, status: Status) -> None:
        """Finish, in bounded time; safe in every state, also before ``start`` and after a failure."""
