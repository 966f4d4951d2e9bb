"""Makes the table and the picture of the routing study from run folders, finished ones only.

Usage: python scripts/routing_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_train.errors import UserError
from moe_train.observe.study import write_study
from moe_train.observe.study.result import Study


def write_and_print(name: str, write: Callable[[Sequence[Path], Path], Study]) -> None:
    """Write table and picture of the run folders on the command line, and print the table.

    Args:
        name: of the study, and of its folder.
        write: makes both from run folders.
    """
    parser = argparse.ArgumentParser(description=f"Table and picture of {name}.")
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("runs") / name, help="where to write both")
    arguments = parser.parse_args()
    try:
        study = write(sorted(arguments.folders), arguments.output)
    except UserError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2)
    print(study.table.read_text())
    for folder in study.unfinished:
        print(f"left out, not finished: {folder}")
    print(f"table:   {study.table}\npicture: {study.picture}")


if __name__ == "__main__":
    write_and_print("routing_study", write_study)
