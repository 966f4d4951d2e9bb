"""All sinks of a run as one, which no failing sink can stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from types import TracebackType

from moe_train.observe.records import KINDS, Record
from moe_train.observe.redact import redact
from moe_train.observe.sinks.base import RunContext, Sink, Status
from moe_train.observe.sinks.console import ConsoleSink
from moe_train.observe.sinks.jsonl import JsonlSink
from moe_train.observe.sinks.wandb import WandbSink, resolve_mode

LOGGER = logging.getLogger(__name__)


class SinkGroup:
    """Hands each record to every sink; one that raises is named in one warning and switched off.

    As a context manager it closes the sinks with the status that the body ended in.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    @property
    def names(self) -> list[str]:
        """Names of the sinks that still work."""
        return [sink.name for sink in self._sinks]

    def start(self, context: RunContext) -> None:
        """Start every sink."""
        self._for_each(lambda sink: sink.start(context))

    def write(self, record: Record) -> None:
        """Hand ``record`` to every sink."""
        assert record.get("kind") in KINDS, f"record of unknown kind: {record.get('kind')!r}"
        assert isinstance(record.get("step"), int), f"record without a step: {record.get('step')!r}"
        self._for_each(lambda sink: sink.write(record))

    def close(self, status: Status) -> None:
        """Close every sink; a second call does nothing."""
        self._for_each(lambda sink: sink.close(status))
        self._sinks.clear()

    def __enter__(self) -> SinkGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("failed" if issubclass(kind, Exception) else "interrupted")

    def _for_each(self, action: Callable[[Sink], None]) -> None:
        """Run ``action`` on every sink and drop those that raise."""
        for sink in tuple(self._sinks):
            try:
                action(sink)
            except Exception as error:  # whatever a log does wrong, the training goes on
                self._sinks.remove(sink)
                reason = redact(f"{type(error).__name__}: {error}")
                LOGGER.warning("log sink %s failed and is switched off: %s", sink.name, reason)
                with contextlib.suppress(Exception):
                    sink.close("failed")


def open_sinks(context: RunContext, is_leader: bool) -> SinkGroup:
    """Return the started sinks of this process: all that the configuration asks for on rank 0, none elsewhere.

    Args:
        context: the run.
        is_leader: whether this process is rank 0.
    """
    if not is_leader:
        return SinkGroup([])
    sinks: list[Sink] = [JsonlSink(), ConsoleSink(sys.stdout)]
    mode = resolve_mode(context.config.log.wandb.mode, has_key=bool(os.environ.get("WANDB_API_KEY")))
    if mode is not None:
        sinks.append(WandbSink(mode))
    group = SinkGroup(sinks)
    group.start(context)
    return group
