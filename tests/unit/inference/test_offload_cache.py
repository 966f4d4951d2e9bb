"""Who stays in memory: bounds that hold for any choices, and the rule of keeping those used most."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.inference.offload.cache import Buffers, Cache
from moe_train.inference.offload.policy import Hotness

PASSES = st.integers(1, 6).flatmap(
    lambda held: st.lists(st.lists(st.integers(0, 3), min_size=held, max_size=held), min_size=1, max_size=12)
)


def cache_of(size: int, num_held: int, buffers: Buffers | None = None) -> Cache:
    """A cache whose experts are one number each: their place."""

    def load(place: int, into: Sequence[Tensor]) -> None:
        into[0].fill_(place)

    return Cache(size, num_held, load, buffers or Buffers(lambda: [torch.full((1,), -1.0)]), expert_bytes=4)


@given(passes=PASSES, size=st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_a_pass_gets_each_expert_that_it_needs_once_and_memory_is_bounded(passes: list[list[int]], size: int) -> None:
    cache = cache_of(size, len(passes[0]))
    needed = 0
    for counts in passes:
        held_before, seen = set(cache.held), []
        for place, tensors in cache.visit(counts):
            assert tensors[0].item() == place
            assert len(cache.held) <= size
            seen.append(place)
        wanted = [place for place, count in enumerate(counts) if count]
        assert sorted(seen) == wanted
        hits = held_before & set(wanted)
        assert set(seen[: len(hits)]) == hits, "those in memory come first"
        needed += len(wanted)
        assert cache.traffic.hits + cache.traffic.misses == needed
        assert cache.traffic.read_bytes == 4 * cache.traffic.misses
    assert cache.buffers.made <= size + 1
    assert cache.buffers.made == len(cache.held) + len(cache.buffers.free)


def test_where_all_have_room_each_is_read_once() -> None:
    cache = cache_of(9, 4)
    for _ in range(5):
        list(cache.visit([1, 1, 1, 1]))
    assert (cache.traffic.hits, cache.traffic.misses) == (16, 4)
    assert cache.buffers.made == 4


def test_layers_share_the_memory_of_the_expert_on_its_way() -> None:
    buffers = Buffers(lambda: [torch.zeros(1)])
    caches = [cache_of(2, 5, buffers) for _ in range(3)]
    for _ in range(4):
        for cache in caches:
            list(cache.visit([1] * 5))
    assert buffers.made == 3 * 2 + 1


def test_those_used_most_stay() -> None:
    """Two experts of each pass are the same; a third one is another each time and passes through."""
    cache = cache_of(2, 6)
    for turn in range(12):
        list(cache.visit([1, 1] + [int(turn % 4 == other) for other in range(4)]))
    assert set(cache.held) == {0, 1}
    assert cache.traffic.hits == 2 * 11


def test_old_uses_fade() -> None:
    cache = cache_of(1, 2)
    cache.hotness = Hotness(2, decay=0.5)
    for _ in range(20):
        list(cache.visit([1, 0]))
    assert set(cache.held) == {0}
    for _ in range(3):
        list(cache.visit([0, 1]))
    assert set(cache.held) == {1}


def test_many_tokens_of_one_pass_are_one_use() -> None:
    cache = cache_of(1, 2)
    list(cache.visit([1000, 0]))
    for _ in range(2):
        list(cache.visit([0, 1]))
    assert set(cache.held) == {1}


def test_an_expert_that_cannot_be_read_leaves_its_memory_behind() -> None:
    cache = cache_of(1, 2)

    def fail(place: int, into: Sequence[Tensor]) -> None:
        raise OSError("gone")

    load, cache.load = cache.load, fail
    with pytest.raises(OSError, match="gone"):
        list(cache.visit([1, 0]))
    assert len(cache.buffers.free) == 1 and not cache.held and cache.traffic.misses == 0
    cache.load = load
    assert [place for place, _ in cache.visit([1, 0])] == [0]
    assert cache.buffers.made == 1
