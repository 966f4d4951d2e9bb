"""The points of a study as a file that people and programs read: points.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_train.errors import DataError, Problem
from moe_train.observe.study.scaling.points import Point, read_point

COLUMNS = [field.name for field in fields(Point)]
POINT = TypeAdapter(Point)


def to_csv(points: Iterable[Point]) -> str:
    """Return a line per point under the names of its attributes; what is None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()


def from_csv(path: Path) -> list[Point]:
    """Return the points of a file that `to_csv` wrote.

    Raises:
        DataError: it cannot be read, or lines that are no points; names each.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("study", path, f"cannot be read: {error}", "name a file that a report wrote")) from None
    points, problems = [], []
    for number, row in enumerate(rows, start=2):
        try:
            points.append(POINT.validate_python({key: value or None for key, value in row.items()}))
        except ValidationError as error:
            columns = ", ".join(str(detail["loc"][0]) for detail in error.errors())
            problems.append(Problem(f"{path}:{number}", None, f"is no point: {columns}", "correct or remove the line"))
    if problems:
        raise DataError(problems)
    return points


def read_points(study: Path) -> tuple[list[Point], tuple[Path, ...]]:
    """Return the finished runs of a study by name, and the folders of runs that are not among them.

    Args:
        study: folder of run folders, or a file that `to_csv` wrote.

    Raises:
        DataError: there is no such folder or file, or nothing finished in it.
    """
    if study.is_file():
        points, others = from_csv(study), []
    elif study.is_dir():
        found = {path: read_point(path) for path in sorted(study.iterdir()) if (path / "config.yaml").is_file()}
        points = [point for point in found.values() if point is not None]
        others = [path for path, point in found.items() if point is None]
    else:
        raise DataError(Problem("study", study, "no such folder", "name the folder that holds the runs' folders"))
    if not points:
        rule = f"holds no finished run ({len(others)} unfinished)"
        raise DataError(Problem("study", study, rule, "run experiment=scaling_laws first"))
    return sorted(points, key=lambda point: point.name), tuple(others)
