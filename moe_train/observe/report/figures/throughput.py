"""Tokens per second over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.report.drawing import BLUE, draw_line, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Throughput"
CAPTION = "Tokens trained per second over all ranks; a dip is a pause, a slope is a leak or a neighbour on the machine."
ABSENT = "No train record holds a rate yet: the first steps are warm-up and are left out."


def draw(run: RunRecord) -> Figure | None:
    """Return tokens per second over steps."""
    from matplotlib.ticker import EngFormatter

    rate = run.train_series("tokens_per_s")
    if not rate:
        return None
    figure = new_figure(2.6)
    axes = figure.subplots()
    draw_line(axes, rate, color=BLUE)
    axes.set_ylim(0, 1.15 * float(np.nanmax(rate.values)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="optimizer step", ylabel="tokens per second")
    return figure
