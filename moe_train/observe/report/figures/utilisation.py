"""How evenly a classifier's experts are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_train.observe.classes import UTILISATION
from moe_train.observe.records import finite, layer_title
from moe_train.observe.report.drawing import INK, PALETTE, legend_above, new_figure
from moe_train.observe.report.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Utilisation of the experts"
CAPTION = (
    "Share of the first choices that each expert has, over the tokens of the held-out texts (in a head: the texts) "
    "of the last evaluation. The dashed line is an even share; the summary above says in words "
    "whether all are used: one that is hardly ever the first choice may be the second of many."
)
ABSENT = "No eval record tells how often each expert was chosen yet."


def draw(run: RunRecord) -> Figure | None:
    """Return bars per expert, side by side for each layer."""
    found = {layer: shares_of(run, layer) for layer in run.layers}
    known = {layer: shares for layer, shares in found.items() if shares}
    if not known:
        return None
    figure = new_figure(2.8)
    axes = figure.subplots()
    width = 0.8 / len(known)
    for place, (layer, shares) in enumerate(known.items()):
        at = np.arange(len(shares)) + (place - (len(known) - 1) / 2) * width
        axes.bar(at, shares, width=width, color=PALETTE[place % len(PALETTE)], label=layer_title(layer))
    even = 1 / max(len(shares) for shares in known.values())
    axes.axhline(even, color=INK, linewidth=1, linestyle="--", label=f"even {even:.3g}")
    axes.set(xlabel="expert", ylabel="share of first choices")
    axes.locator_params(axis="x", integer=True)
    legend_above(axes)
    return figure


def shares_of(run: RunRecord, layer: str) -> list[float]:
    """Return the shares of a layer's experts in the last eval record that tells them; nothing where none does."""
    key = f"moe/{layer}/{UTILISATION}"
    told: list[object] = next((record[key] for record in reversed(run.evals) if isinstance(record.get(key), list)), [])
    return [finite(share) or 0.0 for share in told]
