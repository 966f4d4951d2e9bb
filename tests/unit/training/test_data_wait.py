"""What a step waits for its data: all of it where reading is slow, next to nothing where reading overlaps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from moe_train.data.loader import TrainLoader
from moe_train.data.store import TokenStore
from moe_train.training.loop import Window, next_batches
from moe_train.training.signals import StopRequest

READ_S = 0.05


class Slow:
    """A store that takes a while for each step's only sequence."""

    num_tokens = 1000

    def window(self, start: int, length: int) -> np.ndarray[Any, Any]:
        time.sleep(READ_S)
        return np.arange(start, start + length)


def waited_s(work_s: float, steps: int, prefetches: bool) -> float:
    """Seconds waited in so many steps that take ``work_s`` themselves."""
    with TrainLoader(cast("TokenStore", Slow()), 8, 1, 1, 0, 1, seed=0) as loader:
        world = SimpleNamespace(sum_on_host=torch.Tensor.clone)
        run = SimpleNamespace(loader=loader, world=world)
        window, stop = Window(), SimpleNamespace(signal=None)
        if prefetches:
            loader.prefetch()
            time.sleep(work_s)
        for _ in range(steps):
            _, size, signal = next_batches(cast("Any", run), cast("StopRequest", stop), window)
            assert (size.targets, size.tokens, signal) == (8, 8, None)
            time.sleep(work_s)
    return window.data_wait_s


def test_slow_reading_is_seen() -> None:
    assert waited_s(0.0, 5, prefetches=False) > 4 * READ_S


@pytest.mark.parametrize("prefetches", [False, True])
def test_reading_goes_on_during_a_step(prefetches: bool) -> None:
    """Only a first step that nobody has asked for before is waited for."""
    found = waited_s(4 * READ_S, 3, prefetches)
    assert found < READ_S if prefetches else READ_S <= found < 2 * READ_S


def test_asking_twice_reads_once() -> None:
    with TrainLoader(cast("TokenStore", Slow()), 8, 1, 1, 0, 1, seed=0) as loader:
        loader.prefetch()
        loader.prefetch()
        first = loader.next_step()[0].tokens_BS
        second = loader.next_step()[0].tokens_BS
    with TrainLoader(cast("TokenStore", Slow()), 8, 1, 1, 0, 1, seed=0) as plain:
        assert torch.equal(plain.next_step()[0].tokens_BS, first)
        assert torch.equal(plain.next_step()[0].tokens_BS, second)
