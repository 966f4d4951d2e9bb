"""The texts of one split: their tokens, their words and their classes, read from the prepared files on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_train.data.labelled.manifest import INDEX, PreparedTexts
from moe_train.data.shards import Split, token_type
from moe_train.errors import DataError, Problem


class TextStore:
    """Texts 0 to N - 1 of a split, in the order of their hashes: any first ones are a fair sample of all.

    The index is held in memory, 24 bytes per text; tokens and texts are read at their offset.

    Attributes:
        split: which split.
        num_texts: N, its texts.
        num_tokens: its tokens; texts stand here whole, however many tokens a sequence may have.
        num_bytes: its bytes of UTF-8.
        labels_N: int64, the number of each text's class.
        lengths_N: int64, the tokens of each text, at least 1.
    """

    def __init__(self, prepared: PreparedTexts, split: Split) -> None:
        """Open a split.

        Raises:
            DataError: its files are missing or damaged.
        """
        self._folder = prepared.folder
        self._dtype = token_type(prepared.manifest.vocab_size)
        self._tokens = prepared.folder / f"{split}.tokens.bin"
        self._texts = prepared.folder / f"{split}.texts.bin"
        index = self._read_index(prepared.folder / f"{split}.index.npy")
        self.split = split
        self.num_texts = len(index)
        self.num_tokens = int(index["tokens"].sum())
        self.num_bytes = int(index["bytes"].sum())
        self.labels_N = np.ascontiguousarray(index["label"])
        self.lengths_N = np.ascontiguousarray(index["tokens"])
        self._token_ends = np.cumsum(index["tokens"])
        self._byte_ends = np.cumsum(index["bytes"])
        self._check_sizes()

    def tokens(self, number: int, first: int = 0, limit: int | None = None) -> np.ndarray:
        """Return the tokens of a text from ``first`` on, or the next ``limit`` of them, int64.

        Raises:
            DataError: the file has vanished or shrunk since it was opened.
        """
        length = int(self.lengths_N[number])
        start = int(self._token_ends[number]) - length + first
        count = length - first if limit is None else min(length - first, limit)
        return self._read(self._tokens, self._dtype, start, count).astype(np.int64)

    def text(self, number: int) -> str:
        """Return a text.

        Raises:
            DataError: the file has vanished or shrunk since it was opened.
        """
        start = int(self._byte_ends[number - 1]) if number else 0
        count = int(self._byte_ends[number]) - start
        return self._read(self._texts, np.dtype(np.uint8), start, count).tobytes().decode()

    def _read_index(self, path: Path) -> np.ndarray:
        try:
            index: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(self._damaged(path, f"cannot be read: {error}")) from error
        assert index.dtype == INDEX, f"{path} was not written by this version"
        return index

    def _read(self, path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        try:
            values = np.fromfile(path, dtype=dtype, count=count, offset=start * dtype.itemsize)
        except OSError as error:
            raise DataError(self._damaged(path, f"cannot be read: {error.strerror}")) from error
        if len(values) < count:
            raise DataError(self._damaged(path, f"ends before its item {start + count}"))
        return values

    def _check_sizes(self) -> None:
        problems = []
        sizes = {self._tokens: self.num_tokens * self._dtype.itemsize, self._texts: self.num_bytes}
        for path, wanted in sizes.items():
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                problems.append(self._damaged(path, "is missing"))
            elif found != wanted:
                problems.append(self._damaged(path, f"has {found} bytes and should have {wanted}"))
        if problems:
            raise DataError(problems)

    def _damaged(self, path: Path, rule: str) -> Problem:
        return Problem(str(path), None, rule, f"delete {self._folder} and start again: it is made anew")
