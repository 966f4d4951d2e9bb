"""Several processes as one: what is agreed on, and that a failure of one is the failure of all."""

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, backend_for, portable, world_from_environment
from moe_train.errors import ConfigError, DataError, Problem

PROBLEM = Problem("data.path", "x", "does not exist", "give another")


def caught(work: object, world: World) -> str:
    """What ``leader_first`` raises on this rank."""
    with pytest.raises(Exception) as error:
        world.leader_first(work)
    return f"{type(error.value).__name__}: {error.value}"


def fail(error: Exception) -> None:
    raise error


def agree_on_everything(world: World) -> dict[str, object]:
    done: list[int] = []
    world.leader_first(lambda: done.append(world.rank))
    told = {
        "leader worked": done,
        "broadcast": world.broadcast(f"from {world.rank}"),
        "gather": world.gather(world.rank * 10),
        "sum": world.sum_on_host(torch.tensor([1.0, world.rank])).tolist(),
        "user error": caught(lambda: fail(DataError([PROBLEM, PROBLEM])), world),
        "fault": caught(lambda: fail(OSError("disk full")), world),
    }
    world.agree(None)
    with pytest.raises(ConfigError, match=r"^data\.path=x"):
        world.agree(ConfigError(PROBLEM) if world.rank == 1 else None)
    world.barrier()
    return told


def test_ranks_agree() -> None:
    first, second = run_ranks(agree_on_everything, 2)
    assert (first.pop("leader worked"), second.pop("leader worked")) == ([0], [])
    assert first == second
    assert first["broadcast"] == "from 0"
    assert first["gather"] == [0, 10]
    assert first["sum"] == [2.0, 1.0]
    assert first["user error"] == f"DataError: {PROBLEM}\n{PROBLEM}"
    assert first["fault"] == "RuntimeError: OSError: disk full"


def test_user_errors_keep_their_message_between_processes() -> None:
    """An exception is pickled with its message alone, which was taken for the problems: one per letter."""
    arrived = pickle.loads(pickle.dumps(portable(DataError([PROBLEM, PROBLEM]))))
    with pytest.raises(DataError) as error:
        World.raise_together(arrived)
    assert error.value.problems == (PROBLEM, PROBLEM)
    assert str(error.value) == f"{PROBLEM}\n{PROBLEM}"
    assert error.value.shared, "all ranks have it: only the first prints it"


def test_one_process_has_a_process_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world_from_environment(timeout_s=30.0) as world:
        assert (world.rank, world.size, world.is_leader) == (0, 1, True)
        assert world.gather("x") == ["x"]
        mesh = build_mesh(world, 1)
        assert (mesh.layout.ep, mesh.ep.size(), mesh.edp.size()) == (1, 1, 1)
        world.leader_first(lambda: None)
    assert not dist.is_initialized()
    assert os.environ.get("WORLD_SIZE") is None


def test_the_process_group_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ZeroDivisionError), world_from_environment(timeout_s=30.0):
        _ = 1 / 0
    assert not dist.is_initialized()


def test_backend_of_a_cpu() -> None:
    assert backend_for(torch.device("cpu")) == "gloo"


def slow_leader(world):
    done = []
    world.leader_first(lambda: (time.sleep(5.0), done.append(True)))
    return done


def test_the_others_wait_longer_than_a_collective_when_the_leader_is_at_work():
    assert run_ranks(slow_leader, 2, collective_timeout_s=2.0) == [[True], []]
