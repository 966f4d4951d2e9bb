"""How many tokens pass the blocks that only some take, and how well this is known without later tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.report.drawing import INK, draw_bound, draw_line, draw_per_layer, layer_series, new_figure
from moe_train.observe.report.record import RunRecord, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Tokens that pass the blocks"
CAPTION = (
    "Above, the share of tokens that take a block: dashed as training chooses them, from whole sequences, solid as "
    "they would be chosen without later tokens. Below, the share of tokens for which both choices agree; the dashed "
    "line is reached by never choosing any."
)
ABSENT = "No record tells of blocks that only some tokens pass yet."


def draw(run: RunRecord) -> Figure | None:
    """Return shares and accuracy per block, or None when no record has a finite share."""
    chosen = layer_series(run, "chosen_share", run.depth_layers)
    if not chosen:
        return None
    causal, right = (layer_series(run, name, run.depth_layers) for name in ("causal_share", "causal_accuracy"))
    figure = new_figure(4.2)
    above, below = figure.subplots(2, 1, sharex=True)
    for share in chosen.values():
        draw_line(above, share, color=INK, linestyle="--", linewidth=1)
    draw_per_layer(above, causal, legend=bool(causal))
    above.set_ylim(bottom=0)
    above.set_ylabel("share of tokens")
    draw_per_layer(below, right, legend=bool(right) and not causal)
    if right:
        draw_bound(below, 1 - mean_share(chosen), "none chosen")
    below.set_ylim(top=1)
    below.set(xlabel="optimizer step", ylabel="both agree")
    return figure


def mean_share(lines: dict[str, Series]) -> float:
    """Return the mean over blocks and records of the share that training chose."""
    return float(np.mean([np.nanmean(line.values) for line in lines.values()]))
