"""Text files of the user: .txt, cut at blank lines, and .jsonl, a document per line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.config.schema import SourceConfig
from moe_train.data.sources.base import Document, Identity
from moe_train.data.sources.files import files_identity, find_files
from moe_train.errors import DataError, Problem

LARGEST_CUT_BYTES = 16 * 1024
"""A document of a .txt file ends at the first blank line after this many bytes."""
CUTS_PER_FILE = 32
"""A smaller file is cut more finely, so that a single one can be split into training and held-out documents."""
CUT_ANYWHERE_FACTOR = 8
"""Text without blank lines is cut at any line, a very long line anywhere, once it is this many times as long."""


class TextFiles:
    """Text from a file, a folder or a glob; all bad files are reported together."""

    def __init__(self, config: SourceConfig, domain: str) -> None:
        assert config.path is not None, "the rules of the configuration require data.path for text"
        self.domain = domain
        self.path = config.path
        self.text_field = config.text_field

    def documents(self) -> Iterator[Document]:
        """Stream the documents file by file, in the order of their paths.

        Raises:
            DataError: after the last file; one problem for each file that could not be read to its end.
        """
        problems: list[Problem] = []
        for file in self._files():
            try:
                for text in read_jsonl(file, self.text_field) if file.suffix == ".jsonl" else cut_txt(file):
                    yield Document(text, self.domain)
            except DataError as error:
                problems += error.problems
            except OSError as error:
                remedy = "make it readable or remove it"
                problems.append(Problem(str(file), None, f"cannot be read: {error.strerror}", remedy))
        if problems:
            raise DataError(problems)

    def identity(self) -> Identity:
        """Return path, size and time of modification of each file, and the field that is read."""
        return {"files": files_identity(self._files()), "text_field": self.text_field}

    def _files(self) -> list[Path]:
        return find_files(self.path, (".txt", ".jsonl"), "data.path")


def cut_txt(file: Path) -> Iterator[str]:
    """Stream the pieces of a text file; joined, they are its text (without a byte order mark).

    Raises:
        DataError: bytes that are not UTF-8; names file and byte offset.
    """
    cut_bytes = min(LARGEST_CUT_BYTES, file.stat().st_size // CUTS_PER_FILE)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines: list[bytes] = []
    start, piece_bytes = 0, 0
    with file.open("rb") as stream:
        while line := stream.readline(LARGEST_CUT_BYTES):
            lines.append(line)
            piece_bytes += len(line)
            wanted_bytes = CUT_ANYWHERE_FACTOR * cut_bytes if line.strip() else cut_bytes
            if piece_bytes >= wanted_bytes:
                if text := decode(decoder, b"".join(lines), file, start):
                    yield text
                start += piece_bytes
                lines, piece_bytes = [], 0
    if text := decode(decoder, b"".join(lines), file, start, final=True):
        yield text


def decode(decoder: codecs.IncrementalDecoder, piece: bytes, file: Path, offset: int, final: bool = False) -> str:
    """Decode ``piece``, which starts at byte ``offset`` of ``file``; a character cut in two waits in the decoder."""
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        place = offset - waiting + error.start
        remedy = "convert the file to UTF-8 or remove it"
        raise DataError(Problem(str(file), None, f"byte {place} is not UTF-8 ({error.reason})", remedy)) from None


def read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    """Stream ``text_field`` of each line; blank lines and empty texts are passed over.

    Raises:
        DataError: a line that is not a JSON object with that field; names file and line.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip() and (text := text_of(line, text_field, f"{file}, line {number}")):
                yield text


def text_of(line: bytes, text_field: str, place: str) -> str:
    """Return the text of one JSON line.

    Raises:
        DataError: it is not a JSON object with that field.
    """
    row = row_of(line, place)
    if not isinstance(row.get(text_field), str):
        rule = f"has no text in the field {text_field}; its fields are {', '.join(row) or 'none'}"
        raise DataError(Problem(place, None, rule, "set data.text_field to the field that holds the text"))
    text: str = row[text_field]
    if re.search("[\ud800-\udfff]", text):
        raise DataError(Problem(place, None, "escapes half of a surrogate pair", "mend or remove the line"))
    return text


def row_of(line: bytes, place: str) -> dict[str, Any]:
    """Return the object of one JSON line.

    Raises:
        DataError: it is none; names the place.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(Problem(place, None, f"byte {error.start} is not UTF-8", "convert the file to UTF-8")) from None
    except json.JSONDecodeError as error:
        rule = f"is not JSON (column {error.colno}: {error.msg})"
        raise DataError(Problem(place, None, rule, "mend or remove the line")) from None
    if not isinstance(row, dict):
        raise DataError(Problem(place, None, "is not a JSON object", "write one object per line"))
    return row
