"""Labelled texts without files."""

from __future__ import annotations

import numpy as np


class MadeStore:
    """A store whose text with number i has the token i as often as its length says."""

    def __init__(self, lengths: list[int], labels: list[int] | None = None) -> None:
        self.lengths_N = np.array(lengths, dtype=np.int64)
        self.labels_N = np.array(labels if labels else [i % 3 for i in range(len(lengths))], dtype=np.int64)
        self.num_texts = len(lengths)

    def tokens(self, number: int, first: int = 0, limit: int | None = None) -> np.ndarray:
        length = int(self.lengths_N[number]) - first
        return np.full(length if limit is None else min(length, limit), number, dtype=np.int64)
