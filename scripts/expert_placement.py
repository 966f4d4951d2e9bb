"""Shows how much each rank of a run had to do, and what moving its experts would change, there or on other ranks.

The loads are means over the last tenth of the run's train records. "Now" is where the experts were then; "fixed" is
each expert at the place of its index; "moved" is what `parallel.placement=auto` would choose for these very loads: for
the steps that follow it is as good as loads are steady.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_train.config.model import FFNConfig
from moe_train.moe.packing import choose_places, imbalance, rank_loads
from moe_train.observe.report import RunRecord
from moe_train.observe.report.figures.rank_load import Since, places_over_time
from moe_train.training.placement import blocks_of

SCALE = 10**9
"""Shares become integers, which places are chosen by."""


def last_loads(run: RunRecord, layer: str) -> list[int]:
    """Return the mean load of each expert over the last tenth of the records, in billionths of all assignments."""
    _, load = run.loads(layer)
    mean_E = np.nanmean(load[-max(1, len(load) // 10) :], axis=0)
    return [round(SCALE * float(value)) for value in np.nan_to_num(mean_E)]


def row_of(layer: str, loads: Sequence[int], now: Since, ranks: int, num_blocks: int) -> list[str]:
    """Return the cells of one layer: loads per rank, and the fullest of them in all three cases."""
    fixed = list(range(len(loads)))
    current = now.order(layer, len(loads)) if now.ranks == ranks else fixed
    moved = choose_places(loads, current, ranks, num_blocks)
    mean = max(1, sum(loads)) / ranks
    each = " ".join(f"{load / mean:.2f}" for load in rank_loads(loads, current, ranks))
    figures = [f"{imbalance(loads, places, ranks):.2f}" for places in (current, fixed, moved)]
    moves = sum(new != old for new, old in zip(moved, current, strict=True))
    return [layer.removeprefix("layer_"), each, *figures, str(moves)]


def table(run: RunRecord, ranks: int | None) -> str:
    """Return the figures as a Markdown table.

    Args:
        run: with records of routed layers.
        ranks: number of ranks to look at; None: those that the run had.
    """
    now = places_over_time(run)[-1]
    ranks = ranks or now.ranks
    loads = {layer: last_loads(run, layer) for layer in run.routed_layers}
    for layer, own in loads.items():
        if len(own) % ranks:
            raise SystemExit(f"--ranks={ranks}: does not divide the {len(own)} experts of {layer}; choose a divisor")
    num_blocks = blocks_of(FFNConfig.model_validate(run.setting("model.ffn") or {}), ranks)
    rows = [row_of(layer, own, now, ranks, num_blocks) for layer, own in loads.items()]
    here = "now" if now.ranks == ranks else "now (fixed)"
    headings = ["layer", f"load of each of {ranks} ranks {here}", here, "fixed", "moved", "experts to move"]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    means = [statistics.fmean(float(row[column]) for row in rows) for column in (2, 3, 4)]
    said = "fullest over mean rank, mean over the layers: now {:.3f}, fixed {:.3f}, moved {:.3f}".format(*means)
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:], "", said])


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Load per rank of a run, and with its experts moved.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--ranks", type=int, help="of an EP group; default: those that the run had")
    given = parser.parse_args(arguments)
    run = RunRecord.load(given.run)
    if not run.routed_layers:
        raise SystemExit(f"{given.run}: holds no train record of a layer that routes")
    if given.ranks is not None and given.ranks < 1:
        raise SystemExit(f"--ranks={given.ranks}: must be at least 1")
    print(table(run, given.ranks))


if __name__ == "__main__":
    main(sys.argv[1:])
