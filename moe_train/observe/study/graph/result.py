"""Writing the tables and the picture of the graph study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.observe.study.graph import picture, table
from moe_train.observe.study.graph.outcome import Comparison, read_graph_outcome
from moe_train.observe.study.result import Study, publish, read_all


def write_graph_study(run_dirs: Sequence[Path], output: Path) -> Study:
    """Compare the finished runs among ``run_dirs`` and write ``table.md`` and ``picture.png`` into ``output``.

    Raises:
        DataError: none of them is finished.
        OSError: the folder cannot be written.
    """
    outcomes, unfinished = read_all(run_dirs, read_graph_outcome, "runs/graph_study-graph_e4-seed_0")
    comparison = Comparison(tuple(outcomes))
    return publish(table.markdown(comparison), lambda: picture.draw(comparison), output, unfinished)
