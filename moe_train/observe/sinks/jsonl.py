"""``metrics.jsonl``: one record per line, the source that every other view can be made from."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from moe_train.observe.files import write_atomically
from moe_train.observe.records import Record, parse_record, to_json
from moe_train.observe.sinks.base import RunContext, Status

FILE_NAME = "metrics.jsonl"


class JsonlSink:
    """Appends to ``metrics.jsonl``, flushed line by line, so that a killed run loses at most a torn last line."""

    name = "jsonl"

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, context: RunContext) -> None:
        """Open the file, without what an earlier life measured after ``context.start_step``.

        Raises:
            OSError: the run folder cannot be written.
        """
        path = context.run_dir / FILE_NAME
        forget_after(path, context.start_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Record) -> None:
        """Append ``record``; numbers that are not finite are written as null."""
        assert self._file is not None, "write() before start()"
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def close(self, status: Status) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def forget_after(path: Path, step: int) -> None:
    """Drop torn lines and the train and eval records after ``step``, which a resumed run measures again.

    Events stay: that a run had got further and was interrupted is part of its history. The file is replaced in one
    move, and left alone when nothing is to be dropped.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = [line for line in text.split("\n") if _survives(line, step)]
    remaining = "".join(f"{line}\n" for line in kept)
    if remaining != text:
        write_atomically(path, remaining)


def _survives(line: str, step: int) -> bool:
    """Return whether ``line`` is a whole record that a run resumed at ``step`` keeps."""
    record = parse_record(line)
    return record is not None and (record["kind"] == "event" or record["step"] <= step)
