"""Groups of ranks as workers: they find each other over a file, and are asked together."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from moe_train.benchmark.allocators import NEUTRAL, TUNED, threads_of
from moe_train.benchmark.timing import Timed
from moe_train.benchmark.workers import Together, Worker, WorkerError
from moe_train.dist.world import World, joined

TIMEOUT_S = 300.0
"""Longest wait of a rank for the others."""
JOINED: list[contextlib.AbstractContextManager[World]] = []
"""Process groups of this process: held to its end."""


def rank_environment(threads: int) -> dict[str, str | None]:
    """Return the variables of a process of this project with so many threads, allocator included."""
    return {**NEUTRAL, **TUNED, **threads_of(threads)}


@dataclass(frozen=True)
class Group:
    """Ranks that have built their variants.

    Attributes:
        workers: by rank.
        variants: what each of them can run.
        facts: of rank 0.
    """

    workers: tuple[Worker, ...]
    variants: tuple[str, ...]
    facts: Mapping[str, float]

    def timed(self, variant: str) -> Timed:
        """Return a variant that all ranks run together; it lasts until the slowest is done."""
        return Together(self.workers, variant)

    def facts_of(self, variant: str) -> dict[str, float]:
        """Return the facts whose names begin with that of a variant and a colon."""
        return {
            name.removeprefix(f"{variant}:"): value
            for name, value in self.facts.items()
            if name.startswith(f"{variant}:")
        }


@contextlib.contextmanager
def ranks(
    builder: str, arguments: Mapping[str, Any], size: int, environment: Mapping[str, str | None]
) -> Iterator[Group]:
    """Start ranks and wait until all have built their variants; end them with the context.

    Args:
        builder: ``module:function``; it calls `join` first.
        arguments: for it; ``rank``, ``size`` and ``store`` are added.
        size: number of ranks.
        environment: variables of each, ``OMP_NUM_THREADS`` among them.

    Raises:
        WorkerError: a rank has ended or could not build.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        own = {"size": size, "store": f"{folder}/store"}
        workers = tuple(
            stack.enter_context(Worker(builder, {**arguments, **own, "rank": rank}, environment))
            for rank in range(size)
        )
        answers = answers_of(workers)
        yield Group(workers, tuple(answers[0]["variants"]), answers[0]["facts"])


def answers_of(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Wait for all; raise what all that failed have to say: only one of them may know why."""
    answers, told = [], []
    for rank, worker in enumerate(workers):
        try:
            answers.append(worker.ready())
        except WorkerError as error:
            told.append(f"rank {rank}: {error}")
    if told:
        raise WorkerError("; ".join(told))
    return answers


def join(arguments: Mapping[str, Any]) -> World:
    """Join the other ranks, for as long as this process lives; called in a worker by a builder.

    Args:
        arguments: ``rank``, ``size`` and ``store``, a path.
    """
    if Path("/sys/class/net/lo").exists():  # all ranks are on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(arguments["store"], arguments["size"])
    JOINED.append(joined(store, World(arguments["rank"], arguments["size"], torch.device("cpu"), TIMEOUT_S)))
    return JOINED[-1].__enter__()


@dataclass(frozen=True)
class Abreast:
    """A variant that the ranks begin together.

    Attributes:
        world: the ranks.
        work: what is timed.
    """

    world: World
    work: Callable[[], object]

    def run_ms(self) -> float:
        """Run once; workers are asked one after the other, and that is no part of the time."""
        self.world.barrier()
        start_s = time.perf_counter()
        self.work()
        return (time.perf_counter() - start_s) * 1e3
