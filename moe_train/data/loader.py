"""Batches of tokens in an order that depends on the seed alone: not on ranks, micro-batches or threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from moe_train.data.permutation import permute
from moe_train.data.store import TokenStore
from moe_train.errors import CheckpointError, DataError, Problem
from moe_train.ops.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        tokens_BS: int64, the inputs.
        labels_BS: int64, what is learnt at each position: the token after it, or at the last token of a labelled text
            the number of its class; IGNORE elsewhere and at padding.
        first_sequence: place of its first sequence in the global batch of the step; the others follow.
        valid_BS: bool, which positions hold tokens; None: those with a label.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    first_sequence: int
    valid_BS: Tensor | None = None


class StepLoader(ABC):
    """Endless stream of optimizer steps; epochs follow each other without a gap, each in an order of its own.

    The global sample with number n is sample ``permute(n mod N, N, seed, n div N)``; one step takes the next
    ``global_batch`` of them: micro-batch m, rank r, row j has number ``m·(ranks·B) + r·B + j`` in the step. The next
    step is read in a thread while this one is used. What a sample is, the subclass says.
    """

    def __init__(
        self, num_samples: int, global_batch: int, micro_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        """Start at the first sample.

        Args:
            num_samples: N.
            global_batch: sequences per optimizer step over all ranks.
            micro_batch: B, sequences per rank and micro-batch.
            rank: this rank.
            world_size: number of ranks.
            seed: of the order.
        """
        assert global_batch % (micro_batch * world_size) == 0, "micro_batch x ranks must divide the global batch"
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        micro_batches = global_batch // (micro_batch * world_size)
        self._own_MB = np.arange(global_batch).reshape(micro_batches, world_size, micro_batch)[:, rank]
        self._samples = 0
        self._pending: Future[list[Batch]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    def prefetch(self) -> None:
        """Begin to read the first step, while what trains on it is still being made."""
        self._pending = self._pending or self._thread.submit(self._read_step, self._samples)

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step.

        Raises:
            DataError: a file of tokens has vanished or shrunk.
        """
        pending = self._pending or self._thread.submit(self._read_step, self._samples)
        batches = pending.result()
        self._samples += self.global_batch
        self._pending = self._thread.submit(self._read_step, self._samples)
        return batches

    def state_dict(self) -> dict[str, int]:
        """Return the position: samples handed out over all ranks, and what the order depends on."""
        return {"samples": self._samples, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; ranks, micro-batch and global batch may differ from those that saved it.

        Raises:
            CheckpointError: the order of the data would be another one; lists every difference.
        """
        differences = [
            Problem(f"data position: {name}", here, f"the checkpoint has {state.get(name)}", "set it as it was")
            for name, here in self._order().items()
            if state.get(name) != here
        ]
        if differences:
            raise CheckpointError(differences)
        self._samples = state["samples"]
        self._pending = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _order(self) -> dict[str, int]:
        """Return what the order of the samples depends on."""

    @abstractmethod
    def _read_batches(self, first: int, samples_N: np.ndarray, own_MB: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of a step.

        Args:
            first: number of the step's first sample among all that are ever handed out.
            samples_N: int64, the samples of the step over all ranks, in their order.
            own_MB: int64, places of this rank's samples among them, a row per micro-batch.
        """

    def _read_step(self, first: int) -> list[Batch]:
        numbers_N = first + np.arange(self.global_batch)
        samples_N = np.empty_like(numbers_N)
        for epoch in np.unique(numbers_N // self.num_samples):
            here = numbers_N // self.num_samples == epoch
            samples_N[here] = permute(numbers_N[here] % self.num_samples, self.num_samples, self.seed, int(epoch))
        return self._read_batches(first, samples_N, self._own_MB)


class TrainLoader(StepLoader):
    """Steps over a long sequence of tokens: sample i covers the tokens [i·S, i·S + S] of the split."""

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        """Start at the first sample.

        Args:
            store: the training split.
            seq_len: S, positions per sequence.
            global_batch: sequences per optimizer step over all ranks.
            micro_batch: B, sequences per rank and micro-batch.
            rank: this rank.
            world_size: number of ranks.
            seed: of the order.

        Raises:
            DataError: the split is shorter than one global batch.
        """
        needed_tokens = global_batch * seq_len + 1
        if store.num_tokens < needed_tokens:
            rule = f"the training split has {store.num_tokens} tokens, one global batch needs {needed_tokens}"
            remedy = "give more text, or lower train.global_batch or data.seq_len"
            raise DataError(Problem("data", None, rule, remedy))
        self.store = store
        self.seq_len = seq_len
        super().__init__((store.num_tokens - 1) // seq_len, global_batch, micro_batch, rank, world_size, seed)

    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "seq_len": self.seq_len, "num_tokens": self.store.num_tokens}

    def _read_batches(self, first: int, samples_N: np.ndarray, own_MB: np.ndarray) -> list[Batch]:
        return [self._read_batch(samples_N[places_B], int(places_B[0])) for places_B in own_MB]

    def _read_batch(self, samples_B: np.ndarray, first_sequence: int) -> Batch:
        windows = [self.store.window(int(sample) * self.seq_len, self.seq_len + 1) for sample in samples_B]
        tokens = torch.from_numpy(np.stack(windows))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), first_sequence)


def heldout_batches(
    store: TokenStore, seq_len: int, batch: int, rank: int, world_size: int, limit: int | None
) -> Iterator[Batch]:
    """Return this rank's batches of the held-out split, in its order; all ranks get equally many of the same shape.

    Every token but the first is a label exactly once over all ranks; what is missing to full rows and full batches is
    padded, with IGNORE as label.

    Args:
        store: the held-out split.
        seq_len: S, positions per sequence.
        batch: B, sequences per rank and batch.
        rank: this rank.
        world_size: number of ranks.
        limit: most batches to give; None: the whole split.

    Raises:
        DataError: the split has no token to predict.
    """
    if store.num_tokens < 2:
        rule = f"the held-out split has {store.num_tokens} tokens, evaluation needs 2"
        raise DataError(Problem("data.heldout_fraction", None, rule, "raise it, or give more documents"))
    num_windows = -(-(store.num_tokens - 1) // seq_len)
    num_batches = -(-num_windows // (batch * world_size))
    if limit is not None:
        num_batches = min(num_batches, limit)
    rows = (number * world_size * batch + rank * batch for number in range(num_batches))
    return (_padded_batch(store, seq_len, first, batch) for first in rows)


def _padded_batch(store: TokenStore, seq_len: int, first_window: int, batch: int) -> Batch:
    tokens_BS = torch.zeros(batch, seq_len, dtype=torch.int64)
    labels_BS = torch.full((batch, seq_len), IGNORE, dtype=torch.int64)
    for row in range(batch):
        start = (first_window + row) * seq_len
        length = min(seq_len, store.num_tokens - 1 - start)
        if length > 0:
            window = torch.from_numpy(store.window(start, length + 1))
            tokens_BS[row, :length] = window[:-1]
            labels_BS[row, :length] = window[1:]
    return Batch(tokens_BS, labels_BS, first_window)
