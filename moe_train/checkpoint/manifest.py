"""The list of a checkpoint's files with their sizes and hashes; written last, it makes a checkpoint of a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from moe_train.checkpoint.files import sha256_of
from moe_train.config.base import Strict
from moe_train.errors import CheckpointError, Problem

MANIFEST = "manifest.json"
METADATA = ".metadata"
TRAINER = "trainer.json"

FileName = Annotated[str, Field(pattern=r"^\.?\w[\w.]*$")]
"""A name inside the folder: a manifest cannot point elsewhere."""

OLDER_OR_COPY = "restore the file from a copy, or resume from an older checkpoint"


class FileRecord(Strict):
    """What one file must be."""

    size_bytes: NonNegativeInt
    """Size in bytes."""
    sha256: str
    """SHA-256 in hexadecimal."""


class Manifest(Strict):
    """What one checkpoint must be."""

    format: Literal[1]
    """Version of the layout of the folder."""
    step: NonNegativeInt
    """Optimizer steps done."""
    world_size: PositiveInt
    """Ranks that wrote it; any number may read it."""
    ep: PositiveInt
    """Expert-parallel size that wrote it; any may read it."""
    files: dict[FileName, FileRecord]
    """Every file except the manifest itself, by name."""

    def render(self) -> str:
        """Return the text of manifest.json: the content and, before it, the content's own hash."""
        content = self.model_dump_json(indent=1)
        seal = hashlib.sha256(content.encode()).hexdigest()
        return f'{{"sha256": "{seal}",\n"manifest": {content}}}\n'

    @staticmethod
    def parse(text: str) -> Manifest:
        """Return the manifest that ``render`` wrote.

        Raises:
            ValueError: the text is not, to the last byte, what ``render`` writes.
        """
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        manifest = Manifest.model_validate(document.get("manifest"))
        if manifest.render() != text:
            raise ValueError("its own hash does not match")
        return manifest


def record_of(path: Path) -> FileRecord:
    """Return the size and hash that a file has now."""
    return FileRecord(size_bytes=path.stat().st_size, sha256=sha256_of(path))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint's folder. Says nothing about the files it lists.

    Raises:
        CheckpointError: it is missing, unreadable, altered, or does not list what every checkpoint has.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.parse(path.read_text(encoding="utf-8"))
        missing = {METADATA, TRAINER} - manifest.files.keys()
        if missing:
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
    except OSError as error:
        raise CheckpointError(Problem(str(path), None, error.strerror or str(error), OLDER_OR_COPY)) from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(Problem(str(path), None, f"is damaged: {reason}", OLDER_OR_COPY)) from error
    return manifest


def damage_of(path: Path, expected: FileRecord) -> Problem | None:
    """Return how a file differs from its record, size first because that costs nothing; None when it does not."""
    try:
        actual_bytes = path.stat().st_size
        if actual_bytes != expected.size_bytes:
            return Problem(str(path), None, f"has {actual_bytes} bytes, not {expected.size_bytes}", OLDER_OR_COPY)
        actual = sha256_of(path)
    except OSError as error:
        return Problem(str(path), None, error.strerror or str(error), OLDER_OR_COPY)
    if actual != expected.sha256:
        return Problem(str(path), None, f"has SHA-256 {actual}, not {expected.sha256}", OLDER_OR_COPY)
    return None
