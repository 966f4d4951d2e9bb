"""What fails on one rank fails on all of them with the same error; nobody waits, and nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from part_samples import parts_of
from spawn import run_ranks

from moe_train.checkpoint import manager, reader
from moe_train.checkpoint.faults import FAULT_VARIABLE
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import latest_good
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.errors import CheckpointError


def refuse(*args: Any, **kwargs: Any) -> None:
    raise PermissionError(13, "injected")


def fault_at(point: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setenv(FAULT_VARIABLE, f"{point}:raise")


SAVE_FAULTS: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "writing state on rank 1": (1, fault_at("ckpt.before_tensors")),
    "writing tensors on rank 1": (1, lambda patch: patch.setattr(torch, "save", refuse)),
    "hashing files on rank 1": (1, lambda patch: patch.setattr(manager, "record_of", refuse)),
    "preparing a checkpoint on rank 0": (0, fault_at("ckpt.before_temp")),
    "publishing on rank 0": (0, fault_at("ckpt.before_rename")),
}
LOAD_FAULTS = {
    "verifying files on rank 1": (1, lambda patch: patch.setattr(reader, "damage_of", refuse)),
    "reading state on rank 1": (1, lambda patch: patch.setattr(reader, "_read_state", refuse)),
    "reading metadata on rank 1": (1, lambda patch: patch.setattr(reader, "read_metadata", refuse)),
    "reading tensors on rank 1": (1, lambda patch: patch.setattr(torch, "load", refuse)),
}


def message_with(world: World, fault: tuple[int, Callable[[pytest.MonkeyPatch], None]], work: Callable[[], Any]) -> str:
    """Return the error that this rank sees when ``work`` meets a fault on one rank."""
    faulty_rank, inject = fault
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        if world.rank == faulty_rank:
            inject(patch)
        work()
    return str(caught.value)


def state(rank: int) -> CheckpointState:
    tensors = {"model.experts.w": torch.ones(2, 3), "model.embed": torch.ones(4)}
    parts = parts_of(tensors, ["model.experts.w"], range(2 * rank, 2 * rank + 2), num_experts=4)
    return CheckpointState(parts, {}, b"random")


def resume_and_fill(folder: Path, world: World, mesh: Mesh) -> int:
    found = CheckpointManager(folder, world, mesh.layout, keep=2).resume(str(folder / "step_00000020"))
    assert found is not None
    found.fill(state(world.rank).parts)
    return found.step


def step_after_damage(path: Path, world: World) -> int:
    """Return the step that this rank goes back to when a file is damaged; heal the file."""
    whole = path.read_bytes()
    world.barrier()
    if world.is_leader:
        path.write_bytes(whole[:-1] + b"?")
    world.barrier()
    found = latest_good(path.parent.parent, world)
    assert found is not None
    world.barrier()
    if world.is_leader:
        path.write_bytes(whole)
    return found.step


def fail_in_every_way(world: World, folder: Path) -> dict[str, Any]:
    mesh = build_mesh(world, world.size)
    saver = CheckpointManager(folder, world, mesh.layout, keep=2)
    saver.save(10, state(world.rank))
    told: dict[str, Any] = {}
    for name, fault in SAVE_FAULTS.items():
        told[name] = message_with(world, fault, lambda: saver.save(20, state(world.rank)))
        world.barrier()
        told[f"left by {name}"] = sorted(path.name for path in folder.iterdir())
    saver.save(20, state(world.rank))
    for name, fault in LOAD_FAULTS.items():
        told[name] = message_with(world, fault, lambda: resume_and_fill(folder, world, mesh))
    told["without faults"] = resume_and_fill(folder, world, mesh)
    names = sorted(path.name for path in (folder / "step_00000020").iterdir())
    told["after damage"] = {name: step_after_damage(folder / "step_00000020" / name, world) for name in names}
    return told


def test_all_ranks_are_told_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(fail_in_every_way, 2, tmp_path)
    assert first == second
    for name in SAVE_FAULTS.keys() | LOAD_FAULTS.keys():
        assert first[name].startswith(name), first[name]
        assert len(first[name].splitlines()) == 1, "one problem, told once"
    for name in SAVE_FAULTS:
        assert first[f"left by {name}"] == ["step_00000010"]
    assert first["without faults"] == 20
    assert len(first["after damage"]) == 7, "of two ranks: shards and random states; metadata, trainer, manifest"
    assert set(first["after damage"].values()) == {10}, "whichever rank verifies the damaged file"
