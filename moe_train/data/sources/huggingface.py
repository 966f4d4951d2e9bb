"""Data sets in the formats of Hugging Face: by name, or parquet, JSON lines and CSV on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.config.schema import SourceConfig
from moe_train.data.sources.base import Document, Identity
from moe_train.data.sources.files import find_files
from moe_train.errors import DataError, Problem

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""Which reader of ``datasets`` opens which file."""

ROWS_PER_READ = 1000


class HuggingFace:
    """A row is a document. Rows are memory-mapped, never held together; no code of a data set is run."""

    def __init__(self, config: SourceConfig, domain: str) -> None:
        assert config.path is not None, "the rules of the configuration require data.path for huggingface"
        self.config = config
        self.domain = domain
        self._opened: Any = None

    def documents(self) -> Iterator[Document]:
        """Stream the rows in their order; rows with empty or null text are passed over.

        Raises:
            DataError: no such data set, split or column; a value that is not text.
        """
        field = self.config.text_field
        batches = self._rows().select_columns([field]).iter(ROWS_PER_READ)
        for number, text in enumerate(text for batch in batches for text in batch[field]):
            if text is not None and not isinstance(text, str):
                rule = f"row {number}: the column {field} holds {type(text).__name__}, not text"
                raise DataError(Problem("data.text_field", field, rule, "name a column of text"))
            if text:
                yield Document(text, self.domain)

    def identity(self) -> Identity:
        """Return the fingerprint that ``datasets`` gives the split, and the column that is read."""
        return {"fingerprint": self._rows()._fingerprint, "text_field": self.config.text_field}

    def _rows(self) -> Any:
        if self._opened is None:
            rows = open_rows(self.config)
            if self.config.text_field not in rows.column_names:
                rule = f"no such column; there are {', '.join(rows.column_names)}"
                remedy = "set data.text_field to the column that holds the text"
                raise DataError(Problem("data.text_field", self.config.text_field, rule, remedy))
            self._opened = rows
        return self._opened


def open_rows(config: SourceConfig) -> Any:
    """Open one split as a memory-mapped ``datasets.Dataset``.

    Raises:
        DataError: with the reason that ``datasets`` gives; for a missing split that is the list of splits.
    """
    import datasets  # here, since it takes a second and other sources do not need it

    assert config.path is not None, "the rules of the configuration require data.path for huggingface"
    files = local_files(config.path)
    try:
        if files and not Path(config.path).expanduser().is_dir():
            builder = BUILDERS[files[0].suffix]
            return datasets.load_dataset(builder, data_files=[str(file) for file in files], split=config.split)
        path = str(Path(config.path).expanduser()) if files else config.path
        return datasets.load_dataset(path, config.name, split=config.split)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        key, value = ("data.split", config.split) if "split" in reason.lower() else ("data.path", config.path)
        remedy = "check data.path, data.name and data.split, and the network for a data set of the hub"
        raise DataError(Problem(key, value, f"cannot be loaded: {reason}", remedy)) from error


def local_files(path: str) -> list[Path]:
    """Return the data files that ``path`` names on this machine; none when it is the name of a data set.

    Raises:
        DataError: a path without data files, or with files of several formats.
    """
    place = Path(path).expanduser()
    if not place.exists() and not any(sign in path for sign in "*?[") and place.suffix not in BUILDERS:
        return []
    files = find_files(path, tuple(BUILDERS), "data.path")
    if len(formats := sorted({BUILDERS[file.suffix] for file in files})) > 1:
        remedy = "name the files of one format, for example with a glob"
        raise DataError(Problem("data.path", path, f"holds several formats: {', '.join(formats)}", remedy))
    return files
