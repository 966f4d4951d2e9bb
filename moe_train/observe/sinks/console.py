"""The console: on a terminal a live status under permanent lines, elsewhere plain lines only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

from moe_train.observe.metrics import Ema, RateMeter
from moe_train.observe.records import Record, finite
from moe_train.observe.sinks.base import RunContext, Status
from moe_train.observe.sinks.lines import Progress, eval_line, event_line, legend, printable, train_line
from moe_train.observe.sinks.live import LiveStatus

LOSS_DECAY = 0.9  # smooths over about ten records
RATE_DECAY = 0.95  # a longer memory, so that the time left does not jump with every evaluation


class ConsoleSink:
    """Prints a line per record to ``stream``; on a terminal the newest state also stays in view below.

    Args:
        stream: where to print.
        clock: monotonic time in seconds; tests pass their own.
    """

    name = "console"

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._live: LiveStatus | None = None
        self._loss = Ema(LOSS_DECAY)
        self._loss_ema: float | None = None
        # The first interval holds imports, compilation and the first allocations: it says nothing about the rest.
        self._steps = RateMeter(warmup=1, decay=RATE_DECAY)

    def start(self, context: RunContext) -> None:
        """Print what runs and what the fields mean, and open the live status on a terminal."""
        self._total_steps = context.config.train.steps
        self._last_step, self._last_time = context.start_step, self._clock()
        if is_terminal(self._stream):
            self._live = LiveStatus(self._stream, context.start_step, self._total_steps, self._clock)
        self._print(f"run {printable(context.config.run.name)} in {printable(str(context.run_dir))}")
        self._print(legend(context.config))

    def write(self, record: Record) -> None:
        """Print the line of ``record``."""
        if record["kind"] == "eval":
            self._print(eval_line(record))
        elif record["kind"] == "event":
            self._print(event_line(record))
        else:
            progress = self._advance(record)
            if self._live is not None:
                self._live.update(record, progress)
            self._print(train_line(record, progress))

    def close(self, status: Status) -> None:
        """Take the live status off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _advance(self, record: Record) -> Progress:
        """Take in a train record and return the run's progress."""
        loss, now = finite(record.get("loss")), self._clock()
        if loss is not None:
            self._loss_ema = self._loss.update(loss)
        self._steps.update(record["step"] - self._last_step, now - self._last_time)
        self._last_step, self._last_time = record["step"], now
        remaining_s = self._steps.seconds_for(self._total_steps - record["step"])
        return Progress(self._total_steps, self._loss_ema, remaining_s)

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.print(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
