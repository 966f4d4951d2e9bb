"""The processes of a run: rank, device, and the few collectives on Python objects.

A process group always exists, also in a run of one process, so that no caller has a branch for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moe_train.dist.lives import this_life
from moe_train.dist.rollcall import RollCall
from moe_train.errors import UserError

HEARTBEAT_S = 10.0
"""Between two words of rank 0 to those who wait for it, in seconds."""


@dataclass(frozen=True)
class World:
    """One process's view of all processes.

    Attributes:
        rank: index of this process, 0 to size - 1.
        size: number of processes; all are data-parallel.
        device: where this process computes.
        timeout_s: longest wait for the other ranks in one collective, in seconds.
        group: the processes as its collectives know them; None: torch's default group.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    group: dist.ProcessGroup | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.group)

    def in_background(self) -> World:
        """Return the same processes over a group of its own, for a thread beside the training. Collective.

        Collectives of two threads in one group would meet each other's.
        """
        timeout = timedelta(seconds=self.timeout_s)
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    def broadcast(self, value: object) -> object:
        """Return rank 0's ``value`` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """Return every rank's ``value``, by rank, on every rank."""
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_on_host(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a CPU tensor; does not touch the accelerator."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def leader_first(self, work: Callable[[], object]) -> None:
        """Run ``work`` on rank 0 while the others wait; what it raises is raised on every rank.

        It may take longer than a collective's timeout (a corpus is tokenised for hours): rank 0 works in a thread and
        tells the others again and again that it is still there.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work) if self.is_leader else None
            while True:
                answer = self.broadcast(progress_of(future, min(HEARTBEAT_S, self.timeout_s / 3)))
                assert isinstance(answer, Progress), "rank 0 tells how far it is"
                if answer.is_done:
                    break
        self.raise_together(answer.failure)

    def agree(self, failure: BaseException | None) -> None:
        """Raise the first rank's failure on every rank, or nothing when no rank has one."""
        failures = self.gather(portable(failure))
        self.raise_together(next((f for f in failures if f is not None), None))

    @staticmethod
    def raise_together(failure: object) -> None:
        """Raise ``failure`` if there is one."""
        if isinstance(failure, UserError):
            failure.shared = True
        if isinstance(failure, BaseException):
            raise failure


@dataclass(frozen=True)
class Progress:
    """What rank 0 tells those who wait for it.

    Attributes:
        is_done: whether its work has ended.
        failure: what the work raised, or None.
    """

    is_done: bool
    failure: BaseException | None


def progress_of(future: Future[object] | None, patience_s: float) -> Progress | None:
    """Return how far rank 0's work is after at most ``patience_s`` seconds; None on the other ranks."""
    if future is None:
        return None
    wait([future], timeout=patience_s)
    return Progress(future.done(), portable(future.exception()) if future.done() else None)


def portable(failure: BaseException | None) -> BaseException | None:
    """Return the failure in a form that other processes can rebuild: user errors whole, others as RuntimeError."""
    if failure is None or isinstance(failure, UserError):
        return failure
    return RuntimeError(f"{type(failure).__name__}: {failure}")


def pick_device(local_rank: int) -> torch.device:
    """Return this process's accelerator, or the CPU when there is none."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank % torch.accelerator.device_count())
    return torch.device(accelerator.type, local_rank % torch.accelerator.device_count())


def backend_for(device: torch.device) -> str:
    """Return the collective backend: the device's own, with gloo beside it for tensors on the host."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextlib.contextmanager
def world_from_environment(timeout_s: float) -> Iterator[World]:
    """Join the ranks that torchrun started (or be the only one) until the context ends.

    Args:
        timeout_s: longest wait in one collective, in seconds.

    Yields:
        The world. When the body raises, a roll call names the ranks that are gone before the error goes on.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = this_life(launcher_store(size, timeout_s), rank, size, timeout_s)
    with joined(store, World(rank, size, device, timeout_s)) as world:
        yield world


@contextlib.contextmanager
def joined(store: Store, world: World) -> Iterator[World]:
    """Make the process group over ``store`` and take it down again; on an error, call the roll."""
    dist.init_process_group(
        backend_for(world.device),
        store=PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=world.timeout_s),
    )
    # A client of its own: one that waits on a key blocks every other user of the same client.
    watched = store.clone()  # type: ignore[attr-defined]
    rollcall = RollCall(PrefixStore("rollcall", watched), world.rank, world.size)
    try:
        yield world
    except UserError:
        raise  # every rank has the same one: nobody is missing
    except Exception as error:
        rollcall.explain(error)
        raise
    finally:
        rollcall.close()
        with contextlib.suppress(Exception):  # after a fault the group may be beyond a clean end
            dist.destroy_process_group()


def launcher_store(size: int, timeout_s: float) -> Store:
    """Return the store that the ranks of this run share: torchrun's, or one in memory for a single process."""
    if size == 1:
        return HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and Path("/sys/class/net/lo").exists():
        # All ranks are on this machine: a laptop whose host name resolves nowhere must still work.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    return cast("Store", store)
