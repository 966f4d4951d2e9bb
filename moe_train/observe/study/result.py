"""Writing a study's table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.errors import DataError, Problem
from moe_train.observe.files import write_atomically
from moe_train.observe.report.drawing import PNG_DPI, STYLE
from moe_train.observe.study import picture, table
from moe_train.observe.study.outcome import group, read_outcome


@dataclass(frozen=True)
class Study:
    """Where a study lies.

    Attributes:
        table: Markdown.
        picture: PNG.
        unfinished: folders that were left out, because their runs have no final evaluation or are not of a study.
    """

    table: Path
    picture: Path
    unfinished: tuple[Path, ...]


def write_study(run_dirs: Sequence[Path], output: Path) -> Study:
    """Compare the finished runs among ``run_dirs`` and write ``table.md`` and ``picture.png`` into ``output``.

    Raises:
        DataError: none of them is finished.
        OSError: the folder cannot be written.
    """
    import matplotlib

    outcomes = {run_dir: read_outcome(run_dir) for run_dir in run_dirs}
    variants = group([outcome for outcome in outcomes.values() if outcome is not None])
    if not variants:
        rule = "no run of a study with its final evaluation is among them"
        raise DataError(Problem("run folders", len(run_dirs), rule, "name folders like runs/routing_study-topk-seed_0"))
    unfinished = tuple(run_dir for run_dir, outcome in outcomes.items() if outcome is None)
    study = Study(output / "table.md", output / "picture.png", unfinished)
    write_atomically(study.table, table.markdown(variants))
    with matplotlib.rc_context(STYLE):
        picture.draw(variants).savefig(study.picture, dpi=PNG_DPI, facecolor="white")
    return study
