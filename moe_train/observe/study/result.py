"""Writing a study's table and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moe_train.errors import DataError, Problem
from moe_train.observe.files import write_atomically
from moe_train.observe.report.drawing import PNG_DPI, STYLE
from moe_train.observe.study import picture, table
from moe_train.observe.study.outcome import group, read_outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = TypeVar("Run")


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
    """Compare the finished runs of the routing study and write ``table.md`` and ``picture.png`` into ``output``.

    Raises:
        DataError: none of them is finished.
        OSError: the folder cannot be written.
    """
    outcomes, unfinished = read_all(run_dirs, read_outcome, "runs/routing_study-topk-seed_0")
    variants = group(outcomes)
    return publish(table.markdown(variants), lambda: picture.draw(variants), output, unfinished)


def read_all(
    run_dirs: Sequence[Path], read: Callable[[Path], Run | None], example: str
) -> tuple[list[Run], tuple[Path, ...]]:
    """Return what ``read`` makes of the finished runs, and the folders of the others.

    Args:
        run_dirs: folders of runs.
        read: returns None for a run that is not finished.
        example: how such a folder is named.

    Raises:
        DataError: none of them is finished.
    """
    outcomes = {run_dir: read(run_dir) for run_dir in run_dirs}
    finished = [outcome for outcome in outcomes.values() if outcome is not None]
    if not finished:
        rule = "no run of a study with its final evaluation is among them"
        raise DataError(Problem("run folders", len(run_dirs), rule, f"name folders like {example}"))
    return finished, tuple(run_dir for run_dir, outcome in outcomes.items() if outcome is None)


def publish(text: str, draw: Callable[[], Figure], output: Path, unfinished: tuple[Path, ...]) -> Study:
    """Write the table and the picture of a study into ``output``.

    Args:
        text: Markdown.
        draw: makes the picture, in the style of the report.
        output: folder, made if missing.
        unfinished: folders that were left out.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    study = Study(output / "table.md", output / "picture.png", unfinished)
    write_atomically(study.table, text)
    with matplotlib.rc_context(STYLE):
        draw().savefig(study.picture, dpi=PNG_DPI, facecolor="white")
    return study
