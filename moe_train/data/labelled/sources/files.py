"""Labelled texts of the user: .csv with a heading, and .jsonl, an example per row."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from moe_train.config.schema import SourceConfig
from moe_train.data.labelled.sources.base import Example, as_label
from moe_train.data.sources.base import Identity
from moe_train.data.sources.files import files_identity, find_files
from moe_train.data.sources.text import row_of
from moe_train.errors import DataError, Problem

Row = tuple[str, Mapping[str, object]]
"""Where a row stands, and its values by field."""


class LabelledFiles:
    """Texts and labels from a file, a folder or a glob; all bad rows of all files are reported together."""

    def __init__(self, config: SourceConfig) -> None:
        assert config.path is not None, "the rules of the configuration require data.path for text"
        self.path = config.path
        self.text_field = config.text_field
        self.label_field = config.label_field

    def classes(self) -> None:
        """Return None: a file has labels only."""
        return

    def examples(self) -> Iterator[Example]:
        """Stream the examples file by file; rows with an empty text are passed over.

        Raises:
            DataError: after the last file, with all bad rows.
        """
        bad: list[Problem] = []
        for file in self._files():
            for place, row in self._rows(file, bad):
                try:
                    yield self._example(row, place)
                except DataError as error:
                    bad += error.problems
        if bad:
            raise DataError(bad)

    def identity(self) -> Identity:
        """Return path, size and time of modification of each file, and the fields that are read."""
        fields = {"text_field": self.text_field, "label_field": self.label_field}
        return {"files": files_identity(self._files()), **fields}

    def _files(self) -> list[Path]:
        return find_files(self.path, (".csv", ".jsonl"), "data.path")

    def _rows(self, file: Path, bad: list[Problem]) -> Iterator[Row]:
        try:
            yield from read_csv(file, self._check_heading, bad) if file.suffix == ".csv" else read_jsonl(file, bad)
        except DataError as error:
            bad += error.problems
        except OSError as error:
            remedy = "make it readable or remove it"
            bad.append(Problem(str(file), None, f"cannot be read: {error.strerror}", remedy))

    def _check_heading(self, file: Path, heading: Sequence[str]) -> None:
        """Refuse a heading without the two fields.

        Raises:
            DataError: with those that are missing.
        """
        keys = {"data.text_field": self.text_field, "data.label_field": self.label_field}
        there = ", ".join(heading) or "none"
        problems = [
            Problem(key, field, f"{file} has no such column; its columns are {there}", "name one of them")
            for key, field in keys.items()
            if field not in heading
        ]
        if problems:
            raise DataError(problems)

    def _example(self, row: Mapping[str, object], place: str) -> Example:
        """Return the example of a row.

        Raises:
            DataError: it has no text or no label.
        """
        text, label = row.get(self.text_field), as_label(row.get(self.label_field))
        there = ", ".join(row) or "none"
        problems = []
        if not isinstance(text, str):
            rule = f"has no text in the field {self.text_field}; its fields are {there}"
            problems.append(Problem(place, None, rule, "set data.text_field to the field that holds the text"))
        elif re.search("[\ud800-\udfff]", text):
            rule = "holds bytes that are not UTF-8, or half of a surrogate pair"
            problems.append(Problem(place, None, rule, "convert the file to UTF-8, or remove the row"))
        if label is None:
            rule = f"has no class in the field {self.label_field}; its fields are {there}"
            remedy = "give it a word or a whole number there, or set data.label_field to the field that holds the class"
            problems.append(Problem(place, None, rule, remedy))
        if problems:
            raise DataError(problems)
        assert isinstance(text, str) and label is not None
        return Example(text.strip(), label, place)


def read_jsonl(file: Path, bad: list[Problem]) -> Iterator[Row]:
    """Stream the objects of a file, a line each; blank lines are passed over, what is no object is noted in ``bad``."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file}, line {number}"
            try:
                if line.strip():
                    yield place, row_of(line, place)
            except DataError as error:
                bad += error.problems


def read_csv(file: Path, check_heading: Callable[[Path, Sequence[str]], None], bad: list[Problem]) -> Iterator[Row]:
    """Stream the rows of a file with a heading (RFC 4180); a place is the last line of its row.

    Args:
        file: comma-separated; bytes that are not UTF-8 become lone surrogates, so that they are found row by row.
        check_heading: raises when it lacks a field.
        bad: notes rows that are longer than the heading.

    Raises:
        DataError: from check_heading; quotes that do not close: what follows cannot be told apart.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            check_heading(file, rows.fieldnames or ())
            for row in rows:
                place = f"{file}, line {rows.line_num}"
                if None in row:
                    rule = f"has {len(row[None])} more fields than the heading"
                    bad.append(Problem(place, None, rule, "put texts that contain commas into double quotes"))
                else:
                    yield place, row
        except csv.Error as error:
            place = f"{file}, line {rows.reader.line_num}"
            raise DataError(Problem(place, None, f"is not CSV: {error}", "mend the row")) from None
