"""Labelled rows in the formats of Hugging Face: a data set by name, or parquet, JSON lines and CSV on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train.config.schema import SourceConfig
from moe_train.data.labelled.sources.base import Example, as_label
from moe_train.data.sources.base import Identity
from moe_train.data.sources.huggingface import ROWS_PER_READ, open_rows
from moe_train.errors import DataError, Problem


class LabelledRows:
    """A row is an example; a column of type ``ClassLabel`` says how its classes are called."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._opened: Any = None

    def classes(self) -> tuple[str, ...] | None:
        """Return the names of a ``ClassLabel``.

        Raises:
            DataError: no such data set, split or column.
        """
        names = getattr(self._rows().features[self.config.label_field], "names", None)
        return tuple(names) if names else None

    def examples(self) -> Iterator[Example]:
        """Stream the rows.

        Raises:
            DataError: as classes; after the last row, with all rows without text or class.
        """
        fields, names = [self.config.text_field, self.config.label_field], self.classes()
        bad: list[Problem] = []
        batches = self._rows().select_columns(fields).iter(ROWS_PER_READ)
        pairs = (pair for batch in batches for pair in zip(*(batch[field] for field in fields), strict=True))
        for number, (text, value) in enumerate(pairs):
            label = as_label(value) if names is None else name_of(value, names)
            place = f"row {number}"
            if isinstance(text, str) and label is not None:
                yield Example(text.strip(), label, place)
                continue
            if not isinstance(text, str):
                rule = f"the column {fields[0]} holds {type(text).__name__}, not text"
                bad.append(Problem(place, None, rule, "set data.text_field to a column of text, or remove the row"))
            if label is None:
                rule = f"the column {fields[1]} holds {value!r}, which is no class"
                bad.append(Problem(place, None, rule, "set data.label_field to a column of classes, or remove the row"))
        if bad:
            raise DataError(bad)

    def identity(self) -> Identity:
        """Return the fingerprint that ``datasets`` gives the split, and the columns that are read."""
        fields = {"text_field": self.config.text_field, "label_field": self.config.label_field}
        return {"fingerprint": self._rows()._fingerprint, **fields}

    def _rows(self) -> Any:
        if self._opened is None:
            rows = open_rows(self.config)
            there = ", ".join(rows.column_names)
            keys = {"data.text_field": self.config.text_field, "data.label_field": self.config.label_field}
            problems = [
                Problem(key, field, f"no such column; there are {there}", "name one of them")
                for key, field in keys.items()
                if field not in rows.column_names
            ]
            if problems:
                raise DataError(problems)
            self._opened = rows
        return self._opened


def name_of(value: object, names: tuple[str, ...]) -> str | None:
    """Return the name of a class number; None: there is no such class (-1 stands for a row without)."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
