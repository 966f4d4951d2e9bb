"""A rank that is killed is named by those who live, in one line, soon."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import clean_context

from moe_train.dist.rollcall import RollCall
from moe_train.dist.world import World, joined

SIZE, BUSY, VICTIM = 3, 1, 2
BUSY_S = 6.0
"""Longer than the living may take to answer: this rank's thread answers for it."""
NAMED_WITHIN_S = 15.0


def rank_main(rank: int, port: int, folder: str) -> None:
    """Meet the others; the victim is killed, one rank waits for it in a collective, one is busy before it does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    world = World(rank, SIZE, torch.device("cpu"), timeout_s=60.0)
    with Path(folder, f"stderr{rank}").open("w") as file, contextlib.redirect_stderr(file), joined(store, world):
        world.barrier()
        if rank == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == BUSY:
            time.sleep(BUSY_S)
        world.barrier()


def test_the_living_name_the_dead(tmp_path: Path) -> None:
    # The store outlives the ranks, as that of torchrun does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = clean_context()
    ranks = [context.Process(target=rank_main, args=(rank, store.port, str(tmp_path))) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    ranks[VICTIM].join(60.0)
    killed_s = time.monotonic()
    for process in ranks:
        process.join(max(0.0, killed_s + NAMED_WITHIN_S - time.monotonic()))
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    assert ranks[VICTIM].exitcode == -signal.SIGKILL
    assert hanging == [], "the living must end"
    for rank in range(SIZE):
        if rank != VICTIM:
            told = [line for line in (tmp_path / f"stderr{rank}").read_text().splitlines() if "run ended" in line]
            assert len(told) == 1, told
            assert told[0].startswith(f"[rank {rank}] run ended: lost rank {VICTIM} (host "), told[0]
            assert f"pid {ranks[VICTIM].pid})" in told[0]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_process_alone_calls_no_roll(error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), joined(dist.HashStore(), World(0, 1, torch.device("cpu"), 30.0)):
        raise error
    assert "run ended" not in capfd.readouterr().err


def test_lines_of_several_ranks_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a line was written by itself when Python does not buffer, and another rank's line came before it."""
    written: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    RollCall(dist.HashStore(), 0, 1).say("run ended")
    assert written == ["[rank 0] run ended\n"]


def test_the_watcher_has_left_the_store_when_it_is_closed() -> None:
    """A thread that comes back from C++ while Python is taken down aborts the process."""
    asked = threading.Event()

    class Slow:
        def set(self, key: str, value: str) -> None: ...

        def check(self, keys: list[str]) -> bool:
            asked.set()
            time.sleep(0.02)
            return False

    watcher = RollCall(Slow(), 0, 2)
    assert asked.wait(10.0)
    watcher.close()
    assert not watcher.thread.is_alive()
