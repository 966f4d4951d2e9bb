"""Ranks of one life of a run find each other in a store that has outlived earlier ones.

When a rank dies, torchrun starts all ranks again, but keeps the store (torch 2.13 makes it once and removes nothing from
it): the new ranks would read the addresses of dead ones and the report of their failure. The number of the restart does
not help: each launcher counts those that it began itself.
"""

from __future__ import annotations

import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store

POLL_S = 0.02


def this_life(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """Return a part of the store that only the present ranks use. Collective.

    Every rank but the first shows a number that nobody has used before, and waits for an answer to that number; the
    first answers whatever it finds until all have said that they are here. What a dead rank once wrote may be answered
    too, but nobody reads it.

    Args:
        store: shared by all launchers, with anything in it.
        rank: this rank.
        size: number of ranks.
        timeout_s: longest wait for the others, in seconds.

    Raises:
        TimeoutError: some rank did not come; names the first of them.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        life = f"life {uuid.uuid4().hex}"
        welcome(store, life, size, deadline)
        return PrefixStore(life, store)
    number = uuid.uuid4().hex
    store.set(f"hello/{rank}", number)
    while not store.check([f"welcome/{number}"]):
        wait_or_fail(deadline, "rank 0 did not come")
    life = store.get(f"welcome/{number}").decode()
    mine = PrefixStore(life, store)
    mine.set(f"here/{rank}", "")
    return mine


def welcome(store: Store, life: str, size: int, deadline: float) -> None:
    """Tell every other rank the name of this life, until all know it."""
    mine, absent, answered = PrefixStore(life, store), list(range(1, size)), set()
    while absent:
        for rank in absent:
            number = store.get(f"hello/{rank}").decode() if store.check([f"hello/{rank}"]) else None
            if number is not None and number not in answered:
                store.set(f"welcome/{number}", life)
                answered.add(number)
        absent = [rank for rank in absent if not mine.check([f"here/{rank}"])]
        if absent:
            wait_or_fail(deadline, f"rank {absent[0]} did not come, {len(absent)} of {size} ranks are missing")


def wait_or_fail(deadline: float, failure: str) -> None:
    """Wait a little, unless it is too late."""
    if time.monotonic() > deadline:
        raise TimeoutError(failure)
    time.sleep(POLL_S)
