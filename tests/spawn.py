"""The one way in which tests start ranks: forked from a clean server, over a file store, with a timeout and the first
traceback.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_train.dist.world import World, joined

COLLECTIVE_TIMEOUT_S = 30.0
IMPORTED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "hydra",
    "hypothesis",
    "pydantic",
    "pytest",
    "tokenizers",
]
"""What the server of the ranks imports once, three seconds' work. The project itself is not among it: the server may
stand in another folder, and would find another copy."""


def clean_context() -> mp.context.ForkServerContext:
    """Return the way to start processes which share nothing with this one but what IMPORTED names."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> list[Any]:
    """Run ``work(world, *args)`` on ``world_size`` gloo ranks and return their results by rank.

    ``work`` must be a top-level function and its result picklable. Each start imports the project and the test: put
    many cases into one. What the ranks print is printed here, by rank, once they have ended.
    """
    context = clean_context()
    with tempfile.TemporaryDirectory() as folder:
        # Not among the arguments of the process: there each tensor is a file descriptor, and the server takes 256.
        torch.save((work, args, dict(os.environ)), f"{folder}/task")
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, collective_timeout_s))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline and not any(p.exitcode for p in ranks):
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        time.sleep(0.5 if failed else 0.0)  # the traceback of the first failure, not of those whom it took along
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        for rank in range(world_size):
            said = Path(folder, f"said{rank}")
            sys.stdout.write(said.read_text(errors="replace") if said.exists() else "")
        errors = [path.read_text() for rank in range(world_size) if (path := Path(folder, f"error{rank}")).exists()]
        if errors:
            raise AssertionError("\n".join(errors))
        assert not failed, f"ranks {failed} ended with {[ranks[r].exitcode for r in failed]}"
        missing = [rank for rank in range(world_size) if not Path(folder, f"result{rank}").exists()]
        assert not missing, f"ranks {missing} gave no result within {timeout_s} s"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, collective_timeout_s: float) -> None:
    with Path(folder, f"said{rank}").open("wb") as said:  # the server has the streams of another moment
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    work, args, environment = torch.load(f"{folder}/task", weights_only=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world_size)
    world = World(rank, world_size, torch.device("cpu"), collective_timeout_s)
    try:
        with joined(store, world):
            result = work(world, *args)
            torch.save(result, f"{folder}/partial{rank}")
            Path(folder, f"partial{rank}").replace(f"{folder}/result{rank}")
            dist.barrier()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"--- rank {rank} ---\n{traceback.format_exc()}")
        raise SystemExit(1) from None
