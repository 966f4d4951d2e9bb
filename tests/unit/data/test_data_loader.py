import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.loader import IGNORE, TrainLoader, heldout_batches
from moe_train.errors import CheckpointError, DataError, Problem

PROBLEM = Problem("shard", None, "is gone", "restore it")


class Counting:
    """A store whose token at position i is i, so that a batch shows where it is from."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.threads = set()

    def window(self, start, length):
        assert start >= 0 and start + length <= self.num_tokens
        self.threads.add(threading.current_thread().name)
        return np.arange(start, start + length)


def loader_of(num_tokens, seq_len=4, global_batch=8, micro_batch=2, rank=0, world_size=1, seed=0):
    return TrainLoader(Counting(num_tokens), seq_len, global_batch, micro_batch, rank, world_size, seed)


def step_samples(steps, world_size, micro_batch, num_tokens=101, global_batch=8, seq_len=4, **state):
    """Samples of each step in their global order, put together from all ranks."""
    loaders = [loader_of(num_tokens, seq_len, global_batch, micro_batch, r, world_size) for r in range(world_size)]
    result = []
    for _ in range(steps):
        batches = [loader.next_step() for loader in loaders]
        rows = [row for per_rank in zip(*batches, strict=True) for batch in per_rank for row in batch.tokens_BS]
        result.append([int(row[0]) // seq_len for row in rows])
    for loader in loaders:
        loader.close()
    return result


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_order_is_the_same_for_every_layout(world_size, micro_batch):
    assert step_samples(9, world_size, micro_batch) == step_samples(9, 1, 8)


def test_order_does_not_depend_on_the_global_batch():
    in_eights = [sample for step in step_samples(6, 1, 8) for sample in step]
    in_twelves = [sample for step in step_samples(4, 1, 12, global_batch=12) for sample in step]
    assert in_eights == in_twelves


@settings(deadline=None, max_examples=25)
@given(num_tokens=st.integers(33, 400), seed=st.integers(0, 2**32))
def test_each_epoch_has_each_sample_once(num_tokens, seed):
    num_samples = (num_tokens - 1) // 4
    with loader_of(num_tokens, seed=seed) as loader:
        rows = (row for _ in range(10**6) for batch in loader.next_step() for row in batch.tokens_BS)
        samples = [int(row[0]) // 4 for row in islice(rows, 2 * num_samples)]
    first, second = samples[:num_samples], samples[num_samples:]
    assert sorted(first) == sorted(second) == list(range(num_samples))
    if num_samples > 20:
        assert first != second


def test_batches():
    with loader_of(101, rank=1, world_size=2) as loader:
        batches = loader.next_step()
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens_BS.shape == batch.labels_BS.shape == (2, 4)
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
        assert torch.equal(batch.labels_BS, batch.tokens_BS + 1)


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_resume_is_exact(steps):
    with loader_of(101) as whole, loader_of(101) as first, loader_of(101) as second:
        for _ in range(steps):
            whole.next_step()
            first.next_step()
        second.next_step()  # a prefetched step of another position must not be used
        second.load_state_dict(first.state_dict())
        for _ in range(5):
            for expected, found in zip(whole.next_step(), second.next_step(), strict=True):
                assert torch.equal(expected.tokens_BS, found.tokens_BS)
        assert second.state_dict() == whole.state_dict()


def test_state_of_another_order_is_refused():
    with loader_of(101, seed=1) as saved, loader_of(201, seed=2) as other, pytest.raises(CheckpointError) as caught:
        other.load_state_dict(saved.state_dict())
    assert [problem.key for problem in caught.value.problems] == ["data position: seed", "data position: num_tokens"]


def test_steps_are_read_in_one_other_thread_that_ends():
    with loader_of(101) as loader:
        loader.next_step()
        loader.next_step()
        assert loader.store.threads == {"prefetch_0"}
    assert not any(thread.name == "prefetch_0" for thread in threading.enumerate())


def test_an_error_of_the_thread_is_raised():
    with loader_of(101) as loader:
        loader.next_step()
        loader.next_step()
        loader.store.window = lambda start, length: (_ for _ in ()).throw(DataError([PROBLEM]))
        with pytest.raises(DataError):
            loader.next_step()
            loader.next_step()


def test_corpus_shorter_than_a_global_batch():
    loader_of(33).close()
    with pytest.raises(DataError, match="has 32 tokens, one global batch needs 33"):
        loader_of(32)


@settings(deadline=None)
@given(
    num_tokens=st.integers(2, 300),
    seq_len=st.integers(1, 20),
    batch=st.integers(1, 4),
    world_size=st.integers(1, 4),
)
def test_every_heldout_token_is_a_label_once(num_tokens, seq_len, batch, world_size):
    per_rank = [
        list(heldout_batches(Counting(num_tokens), seq_len, batch, rank, world_size, None))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    in_order = [b for batches in zip(*per_rank, strict=True) for b in batches]
    assert {b.labels_BS.shape for b in in_order} == {(batch, seq_len)}
    labels = torch.cat([b.labels_BS.flatten() for b in in_order])
    tokens = torch.cat([b.tokens_BS.flatten() for b in in_order])
    counted = labels != IGNORE
    assert labels[counted].tolist() == list(range(1, num_tokens))
    assert torch.equal(tokens[counted] + 1, labels[counted])
    assert (tokens[~counted] == 0).all()


def test_heldout_limit_counts_global_batches():
    batches = [list(heldout_batches(Counting(1000), 10, 2, rank, 2, 3)) for rank in range(2)]
    assert [len(own) for own in batches] == [3, 3]
    assert batches[1][0].tokens_BS[:, 0].tolist() == [20, 30]
    assert len(list(heldout_batches(Counting(1000), 10, 2, 0, 2, 999))) == 25


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_empty_heldout_split(num_tokens):
    with pytest.raises(DataError, match=f"has {num_tokens} tokens, evaluation needs 2"):
        heldout_batches(Counting(num_tokens), 4, 1, 0, 1, None)
