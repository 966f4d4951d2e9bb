"""Batches of whole texts: one text per sequence, padded on its right, in an order that no layout changes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from moe_train.data.labelled.store import TextStore
from moe_train.data.loader import Batch, StepLoader
from moe_train.errors import DataError, Problem
from moe_train.ops.loss import IGNORE

LENGTH_MULTIPLE = 16
"""Batches are as long as their longest text, rounded up to this many positions: few shapes, and little padding."""


class TextLoader(StepLoader):
    """Steps over texts: a sample is a text, cut to its first ``seq_len`` tokens.

    All micro-batches of a step, on all ranks, are as long as the longest text of the step needs: shapes depend on no
    layout.
    """

    def __init__(
        self,
        store: TextStore,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        """Start at the first text of the order.

        Args:
            store: the texts to train on.
            seq_len: most positions of a sequence.
            global_batch: texts per optimizer step over all ranks.
            micro_batch: B, texts per rank and micro-batch.
            rank: this rank.
            world_size: number of ranks.
            seed: of the order.

        Raises:
            DataError: there are fewer texts than one global batch.
        """
        if store.num_texts < global_batch:
            rule = f"there are {store.num_texts} texts to train on, one global batch needs {global_batch}"
            raise DataError(Problem("data", None, rule, "give more texts, or lower train.global_batch"))
        self.store = store
        self.seq_len = seq_len
        super().__init__(store.num_texts, global_batch, micro_batch, rank, world_size, seed)

    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "num_texts": self.store.num_texts}

    def _read_batches(self, samples_N: np.ndarray, own_MB: np.ndarray) -> list[Batch]:
        length = padded_length(self.store, samples_N, self.seq_len)
        return [text_batch(self.store, samples_N[places_B], length, int(places_B[0])) for places_B in own_MB]


def heldout_texts(
    store: TextStore, seq_len: int, batch: int, rank: int, world_size: int, limit: int | None
) -> Iterator[Batch]:
    """Return this rank's batches of the held-out texts, in their order; all ranks get equally many of the same shape.

    Every text is in one batch of one rank. Rows that are missing to a full batch have no label and no valid position.

    Args:
        store: the held-out texts.
        seq_len: most positions of a sequence.
        batch: B, texts per rank and batch.
        rank: this rank.
        world_size: number of ranks.
        limit: most batches to give; None: all texts.

    Raises:
        DataError: no text is held out.
    """
    if store.num_texts == 0:
        rule = "no text is held out, evaluation needs one"
        raise DataError(Problem("data.heldout_fraction", None, rule, "raise it, or give more texts"))
    together = batch * world_size
    num_batches = -(-store.num_texts // together)
    if limit is not None:
        num_batches = min(num_batches, limit)
    all_N = np.arange(store.num_texts)
    starts = [number * together for number in range(num_batches)]
    global_batches = (all_N[start : start + together] for start in starts)
    lengths = (padded_length(store, numbers_N, seq_len) for numbers_N in global_batches)
    own = [start + rank * batch for start in starts]
    return (
        text_batch(store, all_N[first : first + batch], length, first, rows=batch)
        for first, length in zip(own, lengths, strict=True)
    )


def padded_length(store: TextStore, numbers_N: np.ndarray, seq_len: int) -> int:
    """Return the positions that texts need when the longest is cut to ``seq_len``, rounded up but never above it."""
    longest = int(store.lengths_N[numbers_N].max())
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)


def text_batch(
    store: TextStore, numbers_B: np.ndarray, length: int, first_sequence: int, rows: int | None = None
) -> Batch:
    """Return texts as a batch.

    Args:
        store: the texts.
        numbers_B: which of them.
        length: S, positions; a longer text keeps its first tokens.
        first_sequence: place of the first in the global batch.
        rows: rows of the batch; those after the texts are empty. None: as many as texts.
    """
    shape = (rows or len(numbers_B), length)
    tokens_BS = torch.zeros(shape, dtype=torch.int64)
    labels_BS = torch.full(shape, IGNORE, dtype=torch.int64)
    valid_BS = torch.zeros(shape, dtype=torch.bool)
    for row, number in enumerate(numbers_B.tolist()):
        tokens = torch.from_numpy(store.tokens(number, length))
        tokens_BS[row, : len(tokens)] = tokens
        valid_BS[row, : len(tokens)] = True
        labels_BS[row, len(tokens) - 1] = int(store.labels_N[number])
    return Batch(tokens_BS, labels_BS, first_sequence, valid_BS)
