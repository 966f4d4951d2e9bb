"""A polite end: a signal lets the current step finish and save; a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What launchers and people send: the last one is how schedulers announce that the time is nearly over."""


class StopRequest:
    """Remembers the first signal that asked this process to stop, while the context lasts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in POLITE:
            self.previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            # torchrun terminates the survivors of a dead rank: their way out, and its roll call, must not be cut.
            del self.previous[signal.SIGTERM]
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the same one again has its usual effect if it is an interrupt."""
        self.signal = self.signal or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_launcher() -> None:
    """Ask the torchrun that started this process to stop too: it was not told by whoever stopped the run.

    To torchrun a rank that ends with a status other than 0 has failed: it would start its ranks again, and wait for a
    machine that has left. One rank per machine asks, at its very end; without torchrun nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it answers with a signal to its ranks
        os.kill(os.getppid(), signal.SIGTERM)
