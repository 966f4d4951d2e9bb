from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_samples import MadeStore

from moe_train.data.labelled.loader import TextLoader, heldout_texts
from moe_train.errors import CheckpointError, DataError
from moe_train.ops.loss import IGNORE

LENGTHS = [1 + (7 * n) % 50 for n in range(37)]


def loader_of(lengths=LENGTHS, seq_len=40, global_batch=8, micro_batch=2, rank=0, world_size=1, seed=0):
    return TextLoader(MadeStore(lengths), seq_len, global_batch, micro_batch, rank, world_size, seed)


def steps_of(steps, world_size, micro_batch, **settings):
    """The rows of each step in their global order, put together from all ranks."""
    loaders = [loader_of(rank=r, world_size=world_size, micro_batch=micro_batch, **settings) for r in range(world_size)]
    result = []
    for _ in range(steps):
        batches = [batch for per_rank in zip(*(lo.next_step() for lo in loaders), strict=True) for batch in per_rank]
        assert [batch.first_sequence for batch in batches] == list(range(0, 8, micro_batch))
        result.append([torch.cat([getattr(b, f) for b in batches]) for f in ("tokens_BS", "labels_BS", "valid_BS")])
    for loader in loaders:
        loader.close()
    return result


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_steps_are_the_same_for_every_layout_shapes_included(world_size, micro_batch):
    for own, whole in zip(steps_of(6, world_size, micro_batch), steps_of(6, 1, 8), strict=True):
        for found, expected in zip(own, whole, strict=True):
            assert torch.equal(found, expected)


class Counted(MadeStore):
    """A store whose texts count their tokens: 0, 1, 2, ..."""

    def tokens(self, number, first=0, limit=None):
        return np.arange(len(super().tokens(number, first, limit))) + first


def test_random_windows_begin_anywhere_and_elsewhere_each_time():
    store, seen = Counted([7] * 8), []
    for rank in (0, 1):
        with TextLoader(store, 4, 8, 2, rank, 2, seed=5, window="random") as loader:
            steps = [torch.cat([batch.tokens_BS for batch in loader.next_step()]) for _ in range(100)]
        seen.append(torch.stack(steps))
        assert torch.equal(seen[-1], seen[-1][..., :1] + torch.arange(4)), "each is one piece of its text"
    starts = torch.cat(seen, dim=1)[..., 0]
    assert torch.bincount(starts.flatten(), minlength=4).div(200).sub(1).abs().max() < 0.25, "each of 4 places alike"
    assert len({tuple(row) for row in starts.tolist()}) > 95, "steps differ"


def test_random_windows_depend_on_no_layout_and_change_no_text_that_fits():
    def rows(world_size, micro_batch, window, seq_len=4):
        loaders = [
            TextLoader(Counted([7, 3, 9, 4] * 4), seq_len, 8, micro_batch, rank, world_size, seed=5, window=window)
            for rank in range(world_size)
        ]
        found = [[lo.next_step() for lo in loaders] for _ in range(3)]
        for lo in loaders:
            lo.close()
        return torch.cat([b.tokens_BS for step in found for per_rank in zip(*step, strict=True) for b in per_rank])

    assert torch.equal(rows(2, 2, "random"), rows(1, 8, "random"))
    assert torch.equal(rows(1, 8, "random", seq_len=9), rows(1, 8, "first", seq_len=9))
    assert not torch.equal(rows(1, 8, "random"), rows(1, 8, "first"))


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=8, max_size=40),
    seed=st.integers(0, 2**32),
    seq_len=st.integers(1, 60),
)
def test_each_epoch_has_each_text_once_as_it_is(lengths, seed, seq_len):
    with loader_of(lengths, seq_len, seed=seed) as loader:
        steps = (loader.next_step() for _ in range(10**6))
        rows = (row for step in steps for b in step for row in zip(b.tokens_BS, b.labels_BS, b.valid_BS, strict=True))
        taken = list(islice(rows, 2 * len(lengths)))
    numbers = []
    for tokens_S, labels_S, valid_S in taken:
        number = int(tokens_S[0])
        length = min(lengths[number], seq_len)
        assert valid_S.tolist() == [place < length for place in range(len(valid_S))]
        assert tokens_S.tolist() == [number if valid else 0 for valid in valid_S]
        expected = torch.full_like(labels_S, IGNORE)
        expected[length - 1] = number % 3
        assert torch.equal(labels_S, expected)
        numbers.append(number)
    assert sorted(numbers[: len(lengths)]) == sorted(numbers[len(lengths) :]) == list(range(len(lengths)))


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 70), min_size=8, max_size=30), seq_len=st.integers(1, 60))
def test_a_step_is_as_long_as_its_longest_text_needs(lengths, seq_len):
    with loader_of(lengths, seq_len) as loader:
        for _ in range(3):
            batches = loader.next_step()
            longest = max(lengths[int(row[0])] for batch in batches for row in batch.tokens_BS)
            (length,) = {batch.tokens_BS.shape[1] for batch in batches}
            assert length == min(16 * ((longest + 15) // 16), seq_len)


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_resume_is_exact(steps):
    with loader_of() as whole, loader_of() as first, loader_of(micro_batch=4) as second:
        for _ in range(steps):
            whole.next_step()
            first.next_step()
        second.next_step()
        second.load_state_dict(first.state_dict())
        for _ in range(6):
            expected, found = whole.next_step(), second.next_step()
            assert torch.equal(torch.cat([b.tokens_BS for b in expected]), torch.cat([b.tokens_BS for b in found]))
        assert second.state_dict() == whole.state_dict()


def test_state_of_another_order_is_refused():
    with loader_of(seed=1) as saved, loader_of(LENGTHS[:20], seq_len=30) as other, pytest.raises(CheckpointError) as e:
        other.load_state_dict(saved.state_dict())
    keys = [problem.key for problem in e.value.problems]
    assert keys == ["data position: seed", "data position: seq_len", "data position: num_texts"]


def test_fewer_texts_than_a_global_batch():
    loader_of(LENGTHS[:8]).close()
    with pytest.raises(DataError, match="there are 7 texts to train on, one global batch needs 8"):
        loader_of(LENGTHS[:7])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(1, 40),
    batch=st.integers(1, 4),
    world_size=st.integers(1, 4),
)
def test_every_heldout_text_is_in_one_batch(lengths, seq_len, batch, world_size):
    store = MadeStore(lengths)
    per_rank = [list(heldout_texts(store, seq_len, batch, rank, world_size, None)) for rank in range(world_size)]
    together = list(zip(*per_rank, strict=True))  # strict: all ranks have equally many
    rows = []
    for batches in together:
        assert len({b.tokens_BS.shape for b in batches}) == 1
        assert batches[0].tokens_BS.shape[0] == batch
        for b in batches:
            assert torch.equal((b.labels_BS != IGNORE).any(1), b.valid_BS.any(1)), "a row has a text, or nothing at all"
            rows += [
                (int(t[0]), int(v.sum()), int(y.amax()))
                for t, y, v in zip(b.tokens_BS, b.labels_BS, b.valid_BS, strict=True)
            ]
    expected = [(n, min(length, seq_len), n % 3) for n, length in enumerate(lengths)]
    assert rows[: len(lengths)] == expected
    assert all(row == (0, 0, IGNORE) for row in rows[len(lengths) :])


def test_heldout_limit_counts_global_batches():
    batches = [list(heldout_texts(MadeStore(LENGTHS), 40, 2, rank, 2, 3)) for rank in range(2)]
    assert [len(own) for own in batches] == [3, 3]
    assert batches[1][0].tokens_BS[:, 0].tolist() == [2, 3]
    assert batches[1][1].first_sequence == 6


def test_no_heldout_text():
    with pytest.raises(DataError, match=r"data\.heldout_fraction: no text is held out"):
        heldout_texts(MadeStore([]), 8, 1, 0, 1, None)
