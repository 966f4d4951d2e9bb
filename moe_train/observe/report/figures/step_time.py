"""Where the time of a step goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.report.drawing import BLUE, PALETTE, VERMILLION, legend_above, new_figure, thinned
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Time of a step"
CAPTION = (
    "Each band is the mean time per optimizer step on rank 0: waiting for data, exchanging tokens, and the rest; "
    "the highest peaks are cut off."
)
ABSENT = "No train record holds the time of a step yet."


def draw(run: RunRecord) -> Figure | None:
    """Return the split of the step into data wait, token exchange and the rest, in milliseconds."""
    total = run.train_series("step_ms")
    if not total:
        return None
    wait, exchange = (np.nan_to_num(run.train_series(key).values) for key in ("data_wait_ms", "exchange_ms"))
    known = np.isfinite(total.values)
    rest = np.clip(total.values - wait - exchange, 0.0, None)
    parts = [thinned(part[known]) for part in (wait, exchange, rest)]
    figure = new_figure(2.8)
    axes = figure.subplots()
    axes.stackplot(
        thinned(total.steps[known]),
        *parts,
        labels=["data wait", "token exchange", "forward, backward, update"],
        colors=[VERMILLION, PALETTE[4], BLUE],
        alpha=0.8,
    )
    # One pause, for a save or an evaluation, must not press the ordinary steps flat.
    axes.set_ylim(0, 1.2 * float(np.percentile(total.values[known], 95)))
    axes.set(xlabel="optimizer step", ylabel="ms per step")
    legend_above(axes)
    return figure
