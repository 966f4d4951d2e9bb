"""The manifest of a prepared folder: written last, it makes the folder complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_train.data.files import write_atomically
from moe_train.data.shards import Split
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, Problem

FORMAT_VERSION: Literal[1] = 1
"""Raised when files or the cleaning of a source change: folders of another version are not used."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


class Totals(BaseModel):
    """Size of a split, or of a shard's part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens: int
    """Tokens, boundaries included."""
    bytes: int
    """Bytes of UTF-8."""
    documents: int
    """Documents."""


class FolderManifest(BaseModel):
    """What every complete folder says of itself; a subclass adds ``format_version`` and what the folder holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """64 hex digits; equal when texts, split and tokenizer are."""
    tokenizer_fingerprint: str
    """Tokenizer.fingerprint."""
    boundary_token: str
    """Name of the token that ends a document."""
    vocab_size: int
    """One more than the largest token id."""

    def write(self, folder: Path) -> None:
        """Write the manifest into the folder it describes."""
        write_atomically(folder / MANIFEST_NAME, self.model_dump_json(indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            DataError: none is there, or it is not one of this version.
        """
        path = folder / MANIFEST_NAME
        remedy = "prepare the corpus again (python -m moe_train.prepare)"
        if not path.is_file():
            raise DataError(Problem(str(folder), None, f"has no {MANIFEST_NAME}: it is not complete", remedy))
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            version = cls.model_fields["format_version"].default
            rule = f"is not a manifest of format {version}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise DataError(Problem(str(path), None, rule, f"delete {folder} and {remedy}")) from error

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Return the tokenizer that made the tokens of the folder.

        Raises:
            DataError: the file beside the tokens is missing or another one.
        """
        path = folder / TOKENIZER_NAME
        tokenizer = Tokenizer.load(path, self.boundary_token)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            rule = "is not the tokenizer that made the tokens beside it"
            raise DataError(Problem(str(path), None, rule, f"delete {folder} and prepare the corpus again"))
        return tokenizer


class Manifest(FolderManifest):
    """What a folder of tokens holds."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of the files."""
    domains: tuple[str, ...]
    """Labels; the index of a shard holds positions in this list."""
    splits: dict[Split, Totals]
    """Size of each split."""
    unigrams: dict[Split, str]
    """File with how often each token occurs in each split: int64 [V], .npy."""
    shards: tuple[dict[Split, Totals], ...]
    """Size of each shard's part of each split, in the order of the shards."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A complete folder of tokens.

    Attributes:
        folder: with manifest, tokenizer and shards.
        manifest: what it holds.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> PreparedCorpus:
        """Read the manifest of a folder.

        Raises:
            DataError: the folder is not complete, or not of this version.
        """
        return cls(folder, Manifest.read(folder))

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens.

        Raises:
            DataError: the file beside the tokens is missing or another one.
        """
        return self.manifest.tokenizer(self.folder)
