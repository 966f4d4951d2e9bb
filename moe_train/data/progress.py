"""How far a long preparation is: a bar on a terminal, plain lines in a log file, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
"""Called with the bytes of text that were just done."""
ShowProgress = Callable[[str, int | None], AbstractContextManager[Advance]]
"""Opens the display of one stage, from its name and its length in bytes (None: unknown)."""

SECONDS_BETWEEN_LINES = 10.0
MIB = 1024 * 1024


@contextmanager
def no_progress(stage: str, total_bytes: int | None) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done_bytes: None


@contextmanager
def console_progress(stage: str, total_bytes: int | None) -> Iterator[Advance]:
    """Show a stage on standard error: a bar on a terminal, else a line at most every ten seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_writer(console, stage, total_bytes)
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(stage, total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)


def _line_writer(console: Console, stage: str, total_bytes: int | None) -> Advance:
    done, next_line = 0, monotonic() + SECONDS_BETWEEN_LINES
    goal = "" if total_bytes is None else f" of {total_bytes / MIB:.1f}"

    def advance(done_bytes: int) -> None:
        nonlocal done, next_line
        done += done_bytes
        if monotonic() >= next_line:
            console.print(f"{stage}: {done / MIB:.1f}{goal} MiB", highlight=False)
            next_line = monotonic() + SECONDS_BETWEEN_LINES

    return advance
