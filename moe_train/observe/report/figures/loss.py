"""Loss over steps: training, held-out, and what a model that ignores context reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.records import Record, finite
from moe_train.observe.report.drawing import BLUE, GREEN, INK, VERMILLION, draw_line, legend_above, new_figure, smoothed
from moe_train.observe.report.record import RunRecord, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Loss"
CAPTION = (
    "Mean cross-entropy per token, or per text where classes are learnt, without auxiliary losses; the thin line is as "
    "measured, the thick one smoothed. Further ahead: that of multi-token prediction, of the tokens after the next. "
    "Looking ahead: held-out with the choices of training, which later tokens take part in: a model that writes has "
    "only the other one."
)
ABSENT = "No train or eval record holds a finite loss yet."


def draw(run: RunRecord) -> Figure | None:
    """Return train and held-out loss, in nats per token, with the unigram baseline where the run measured it."""
    train, heldout = run.train_series("loss"), run.eval_series("loss")
    if not train and not heldout:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    if train:
        draw_line(axes, train, color=BLUE, alpha=0.35, linewidth=0.8)
        draw_line(axes, smoothed(train), color=BLUE, label="train")
    ahead = run.train_series("mtp_loss")
    if ahead:
        draw_line(axes, smoothed(ahead), color=GREEN, label="further ahead")
    if heldout:
        draw_line(axes, heldout, color=VERMILLION, label="held-out", marker="o", markersize=4)
    leaking = run.eval_series("loss_looking_ahead")
    if leaking:
        style = {"linestyle": ":", "marker": "o", "markersize": 3}
        draw_line(axes, leaking, color=VERMILLION, label="held-out, looking ahead", **style)
    baseline = series(run.evals, unigram_loss)
    if baseline:
        level = float(baseline.values[np.isfinite(baseline.values)][-1])
        axes.axhline(level, color=INK, linewidth=1, linestyle="--", label=f"unigram {level:.2f}")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {run.loss_unit})")
    legend_above(axes)
    return figure


def unigram_loss(record: Record) -> float | None:
    """Return the unigram model's loss in nats per token: its bits per byte, times this tokenizer's nats per bit."""
    loss, bits, unigram = (finite(record.get(key)) for key in ("loss", "bits_per_byte", "unigram_bits_per_byte"))
    return unigram * loss / bits if loss is not None and bits and unigram is not None else None
