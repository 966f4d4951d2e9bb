"""Makes the tables and the picture of the graph study from run folders, finished ones only.

Usage: python scripts/graph_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_train.errors import UserError
from moe_train.observe.study.graph import write_graph_study


def main() -> None:
    """Write both and print the tables."""
    parser = argparse.ArgumentParser(description="Tables and picture of the graph study.")
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("runs/graph_study"), help="where to write both")
    arguments = parser.parse_args()
    try:
        study = write_graph_study(sorted(arguments.folders), arguments.output)
    except UserError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2)
    print(study.table.read_text())
    for folder in study.unfinished:
        print(f"left out, not finished: {folder}")
    print(f"tables:  {study.table}\npicture: {study.picture}")


if __name__ == "__main__":
    main()
