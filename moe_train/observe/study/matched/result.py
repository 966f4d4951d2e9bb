"""Writing the tables and the picture of a matched study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.observe.study.matched import picture, table
from moe_train.observe.study.matched.outcome import Comparison, read_matched_outcome
from moe_train.observe.study.matched.plan import Plan
from moe_train.observe.study.result import Study, publish, read_all


def write_matched_study(plan: Plan, run_dirs: Sequence[Path], output: Path) -> Study:
    """Compare the finished runs among ``run_dirs`` and write ``table.md`` and ``picture.png`` into ``output``.

    Raises:
        DataError: none of them is finished.
        OSError: the folder cannot be written.
    """
    example = f"runs/{plan.name}-{plan.variants[0]}-seed_0"
    outcomes, unfinished = read_all(run_dirs, read_matched_outcome, example)
    comparison = Comparison(plan, tuple(outcomes))
    return publish(table.markdown(comparison), lambda: picture.draw(comparison), output, unfinished)
