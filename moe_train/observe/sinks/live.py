"""The live status on a terminal: a progress bar and the newest figures, redrawn in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from moe_train.observe.records import Record, layer_title
from moe_train.observe.sinks.lines import Progress, count, data_share, duration, number, percent, told_health

if TYPE_CHECKING:
    from rich.console import RenderableType

REDRAWS_PER_SECOND = 2  # enough for a clock that counts down; the training has better uses for the core


class LiveStatus:
    """Keeps the newest figures in view at the foot of a terminal.

    Args:
        stream: the terminal.
        start_step: optimizer steps done before the first record.
        total_steps: optimizer steps of the whole run.
        clock: monotonic time in seconds.
    """

    def __init__(self, stream: TextIO, start_step: int, total_steps: int, clock: Callable[[], float]) -> None:
        # A run in a batch system never gets here and need not pay for the import.
        from rich.console import Console
        from rich.live import Live

        self._step, self._total_steps = start_step, total_steps
        self._clock = clock
        self._record: Record | None = None
        self._progress = Progress(total_steps, None, None)
        self._updated = clock()
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._panel,
            refresh_per_second=REDRAWS_PER_SECOND,
            transient=True,
        )
        self._live.start()

    def print(self, line: str) -> None:
        """Print a permanent line above the status."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, record: Record, progress: Progress) -> None:
        """Show a new train record."""
        self._step, self._record = record["step"], record
        self._progress, self._updated = progress, self._clock()

    def stop(self) -> None:
        """Take the status off the terminal."""
        self._live.stop()

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column()
        top.add_column(ratio=1)
        top.add_column(justify="right")
        share = f"step {self._step}/{self._total_steps} {self._step / self._total_steps:.0%}"
        bar = ProgressBar(total=self._total_steps, completed=self._step)
        top.add_row(share, bar, f"eta {duration(self._remaining_s())}")
        return Panel(Group(top, *(Text(line, overflow="ellipsis", no_wrap=True) for line in self._figures())))

    def _figures(self) -> list[str]:
        """Return the lines under the bar."""
        record = self._record
        if record is None:
            return ["waiting for the first record"]
        loss, ema = number(record.get("loss"), ".3f"), number(self._progress.loss_ema, ".2f")
        lines = [
            f"loss {loss} (ema {ema})   gnorm {number(record.get('grad_norm'), '.2f')}   "
            f"lr {number(record.get('lr'), '.1e')}   {count(record.get('tokens_per_s'))} tok/s   "
            f"mem {number(record.get('memory_gib'), '.1f')}G   data {percent(data_share(record))}"
        ]
        told = told_health(record)
        return lines + [f"{kind}: {text}   worst {layer_title(layer)}" for kind, text, layer in told]

    def _remaining_s(self) -> float | None:
        """Return the time left, counted down since the last record, in seconds."""
        estimate = self._progress.remaining_s
        return None if estimate is None else max(0.0, estimate - (self._clock() - self._updated))
