"""Makes the table and the picture of the routing study from run folders, finished ones only.

Usage: python scripts/routing_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_train.errors import UserError
from moe_train.observe.study import write_study


def main() -> None:
    """Write both and print the table."""
    parser = argparse.ArgumentParser(description="Table and picture of the routing study.")
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("runs/routing_study"), help="where to write both")
    arguments = parser.parse_args()
    try:
        study = write_study(sorted(arguments.folders), arguments.output)
    except UserError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2)
    print(study.table.read_text())
    for folder in study.unfinished:
        print(f"left out, not finished: {folder}")
    print(f"table:   {study.table}\npicture: {study.picture}")


if __name__ == "__main__":
    main()
