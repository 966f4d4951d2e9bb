"""Batches of whole texts: one text per sequence, padded on its right, in an order that no layout changes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moe_train.config.schema import TextWindow
from moe_train.data.labelled.store import TextStore
from moe_train.data.loader import Batch, StepLoader
from moe_train.data.permutation import splitmix64
from moe_train.errors import DataError, Problem
from moe_train.ops.loss import IGNORE

LENGTH_MULTIPLE = 16
"""Batches are as long as their longest text, rounded up to this many positions: few shapes, and little padding."""


class TextLoader(StepLoader):
    """Steps over texts: a sample is a text, or ``seq_len`` tokens of a longer one.

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
        window: TextWindow = "first",
    ) -> None:
        """Start at the first text of the order.

        Args:
            store: the texts to train on.
            seq_len: most positions of a sequence.
            global_batch: texts per optimizer step over all ranks.
            micro_batch: B, texts per rank and micro-batch.
            rank: this rank.
            world_size: number of ranks.
            seed: of the order, and of the windows.
            window: which tokens of a longer text are read.

        Raises:
            DataError: there are fewer texts than one global batch.
        """
        if store.num_texts < global_batch:
            rule = f"there are {store.num_texts} texts to train on, one global batch needs {global_batch}"
            raise DataError(Problem("data", None, rule, "give more texts, or lower train.global_batch"))
        self.store = store
        self.seq_len = seq_len
        self.window = window
        super().__init__(store.num_texts, global_batch, micro_batch, rank, world_size, seed)

    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "num_texts": self.store.num_texts}

    def _read_batches(self, first: int, samples_N: np.ndarray, own_MB: np.ndarray) -> list[Batch]:
        length = padded_length(self.store, samples_N, self.seq_len)
        starts_N = np.zeros_like(samples_N)
        if self.window == "random":
            starts_N = window_starts(first, self.store.lengths_N[samples_N], self.seq_len, self.seed)
        return [
            text_batch(self.store, samples_N[places_B], length, int(places_B[0]), starts_B=starts_N[places_B])
            for places_B in own_MB
        ]


def window_starts(first: int, lengths_N: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
    """Return where the windows of texts begin, int64 [N]: anywhere, each place as likely as the others.

    Args:
        first: number of the first text among all that are ever handed out: the same text begins elsewhere each time.
        lengths_N: tokens of the texts.
        seq_len: tokens of a window; a text that is no longer begins at 0.
        seed: of the draws.
    """
    numbers_N = np.arange(first, first + len(lengths_N), dtype=np.uint64)
    draws_N = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ splitmix64(numbers_N))
    places_N = np.maximum(lengths_N - seq_len, 0) + 1
    starts_N: np.ndarray = (draws_N % places_N.astype(np.uint64)).astype(np.int64)
    return starts_N


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


def labelled_texts(store: TextStore, seq_len: int, batch: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield all texts once, in their order: tokens [B, S], valid [B, S] bool and classes [B] of up to ``batch`` texts.

    Args:
        store: the texts.
        seq_len: most tokens of a text, from its beginning.
        batch: texts that are read at a time.
    """
    for numbers_B in np.array_split(np.arange(store.num_texts), range(batch, store.num_texts, batch)):
        texts = text_batch(store, numbers_B, padded_length(store, numbers_B, seq_len), 0)
        assert texts.valid_BS is not None, "texts are padded"
        yield texts.tokens_BS, texts.valid_BS, torch.from_numpy(store.labels_N[numbers_B])


def padded_length(store: TextStore, numbers_N: np.ndarray, seq_len: int) -> int:
    """Return the positions that texts need when the longest is cut to ``seq_len``, rounded up but never above it."""
    longest = int(store.lengths_N[numbers_N].max())
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)


def text_batch(
    store: TextStore,
    numbers_B: np.ndarray,
    length: int,
    first_sequence: int,
    rows: int | None = None,
    starts_B: np.ndarray | None = None,
) -> Batch:
    """Return texts as a batch.

    Args:
        store: the texts.
        numbers_B: which of them.
        length: S, positions.
        first_sequence: place of the first in the global batch.
        rows: rows of the batch; those after the texts are empty. None: as many as texts.
        starts_B: the first token that is read of each; None: all are read from their beginning.
    """
    starts_B = np.zeros_like(numbers_B) if starts_B is None else starts_B
    shape = (rows or len(numbers_B), length)
    tokens_BS = torch.zeros(shape, dtype=torch.int64)
    labels_BS = torch.full(shape, IGNORE, dtype=torch.int64)
    valid_BS = torch.zeros(shape, dtype=torch.bool)
    for row, (number, start) in enumerate(zip(numbers_B.tolist(), starts_B.tolist(), strict=True)):
        tokens = torch.from_numpy(store.tokens(number, start, length))
        tokens_BS[row, : len(tokens)] = tokens
        valid_BS[row, : len(tokens)] = True
        labels_BS[row, len(tokens) - 1] = int(store.labels_N[number])
    return Batch(tokens_BS, labels_BS, first_sequence, valid_BS)
