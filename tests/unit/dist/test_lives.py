"""A store that has outlived ranks leads the new ones to each other, and not to the dead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from moe_train.dist.lives import this_life

SIZE = 4


def live(store: Store, ranks: Sequence[int], timeout_s: float = 10.0) -> list[Store]:
    """The stores of these ranks; they come at the same time."""
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(lambda rank: this_life(store, rank, SIZE, timeout_s), ranks))


def test_restarted_ranks_read_nothing_of_dead_ones() -> None:
    """torchrun keeps one store over restarts: the new ranks tried to connect to the addresses of the dead ones."""
    store = dist.HashStore()
    for life in range(3):
        stores = live(store, range(SIZE))
        assert not any(mine.check(["address"]) for mine in stores)
        stores[life % SIZE].set("address", f"of life {life}")
        assert {mine.get("address") for mine in stores} == {f"of life {life}".encode()}


@pytest.mark.parametrize("came", [[1, 2, 3], [0, 1, 3], [0], [2]])
def test_a_life_that_never_began_does_not_disturb_the_next(came: list[int]) -> None:
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="did not come"):
        live(store, came, timeout_s=0.2)
    stores = live(store, range(SIZE))
    stores[3].set("word", "x")
    assert all(mine.get("word") == b"x" for mine in stores)


def test_the_missing_rank_is_named() -> None:
    with pytest.raises(TimeoutError, match="rank 2 did not come, 1 of 4 ranks are missing"):
        live(dist.HashStore(), [0, 1, 3], timeout_s=0.5)


def test_one_process_needs_nobody() -> None:
    assert not this_life(dist.HashStore(), 0, 1, 1.0).check(["address"])
