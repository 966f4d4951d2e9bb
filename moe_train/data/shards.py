"""One shard on disk: the tokens of its training and of its held-out documents, and an index of the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_train.data.files import npy, write_atomically

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

INDEX = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("domain", "<i4"), ("heldout", "?")])
"""A row per document, in the order of the corpus: tokens with the boundary, bytes of UTF-8, number of its domain."""


@dataclass(frozen=True)
class ShardFiles:
    """Names of the files of a shard.

    Attributes:
        folder: where they are.
        number: position of the shard in the corpus, from 0.
    """

    folder: Path
    number: int

    def tokens(self, split: Split) -> Path:
        """Return the file of a split's token ids, little-endian."""
        return self.folder / f"shard_{self.number:05d}.{split}.bin"

    @property
    def index(self) -> Path:
        """The index, written last: a shard that has one is complete."""
        return self.folder / f"shard_{self.number:05d}.index.npy"


def token_type(vocab_size: int) -> np.dtype:
    """Return the smallest type on disk that holds every token id: uint16 or uint32, little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(files: ShardFiles, documents: Sequence[np.ndarray], index: np.ndarray, dtype: np.dtype) -> None:
    """Write a shard; each file appears whole or not at all.

    Args:
        files: where to.
        documents: token ids of each document, with its boundary.
        index: a row of INDEX per document.
        dtype: type of a token on disk.
    """
    for split in SPLITS:
        chosen = [documents[row] for row in np.flatnonzero(in_split(index, split)).tolist()]
        write_atomically(files.tokens(split), b"".join(tokens.astype(dtype).tobytes() for tokens in chosen))
    write_atomically(files.index, npy(index))


def in_split(index: np.ndarray, split: Split) -> np.ndarray:
    """Return a bool per row of an index: whether the document is in ``split``."""
    chosen: np.ndarray = index["heldout"] == (split == "heldout")
    return chosen


def read_index(files: ShardFiles) -> np.ndarray:
    """Return the rows of INDEX of a complete shard."""
    index: np.ndarray = np.load(files.index, allow_pickle=False)
    assert index.dtype == INDEX, f"{files.index} was not written by this version"
    return index
