"""Saving beside the training on several ranks: collectives of the two do not meet, and a failure is everybody's."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from part_samples import parts_of
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint import manager as manager_module
from moe_train.checkpoint.background import BackgroundSaver
from moe_train.checkpoint.faults import FAULT_VARIABLE
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import latest_good
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World
from moe_train.errors import CheckpointError

STEPS, EVERY = 40, 4


def parts(tensors: dict[str, Tensor], rank: int) -> dict[str, Part]:
    return parts_of(tensors, ["model.experts.w"], range(2 * rank, 2 * rank + 2), num_experts=4)


def tensors_at(step: int, rank: int) -> dict[str, Tensor]:
    return {
        "model.experts.w": torch.full((2, 30, 5), step + 0.25 * rank),
        "model.embed": torch.full((1000, 7), float(step)),
        "optim.embed.step": torch.tensor(float(step)),
    }


def train(saver: BackgroundSaver, world: World) -> dict[str, Any]:
    """Change weights in place at each step, with collectives on objects and tensors as a training has them."""
    tensors = tensors_at(0, world.rank)
    wrong, overlapped = [], 0
    for step in range(1, STEPS + 1):
        for tensor in tensors.values():
            tensor += 1.0
        total = torch.tensor([float(step * (world.rank + 1))])
        dist.all_reduce(total)
        objects = world.gather((step, world.rank))
        world.barrier()
        if total.item() != 3 * step or objects != [(step, 0), (step, 1)]:
            wrong.append((step, total.item(), objects))
        overlapped += saver.under_way is not None and not saver.under_way.done()
        if step % EVERY == 0:
            saver.save(step, CheckpointState(parts(tensors, world.rank), {"step": step}, b"random"))
    return {"wrong": wrong, "overlapped": overlapped}


def is_exact(folder: Path, world: World, step: int) -> bool:
    found = latest_good(folder, world)
    assert found is not None
    filled = {key: torch.zeros_like(tensor) for key, tensor in tensors_at(0, world.rank).items()}
    found.fill(parts(filled, world.rank))
    truth = tensors_at(step, world.rank)
    return found.step == step and all(torch.equal(filled[key], truth[key]) for key in truth)


def failure_on_rank_1(saver: BackgroundSaver, world: World) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        if world.rank == 1:
            patch.setenv(FAULT_VARIABLE, "ckpt.before_tensors:raise")
        saver.save(STEPS + 1, CheckpointState(parts(tensors_at(1, world.rank), world.rank), {}, None))
        saver.wait()
    return str(caught.value)


def goes_on_while_rank_1_is_slow(saver: BackgroundSaver, world: World) -> bool:
    """Whether the call returns while another rank's disk is still busy."""
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(manager_module, "fault_point", lambda point: time.sleep(5.0))
        saver.save(STEPS + 2, CheckpointState(parts(tensors_at(STEPS + 2, world.rank), world.rank), {}, None))
        assert saver.under_way is not None
        goes_on = not saver.under_way.done()
        saver.wait()
    return goes_on


def beside_a_training(world: World, folder: Path) -> dict[str, Any]:
    manager = CheckpointManager(folder, world, build_mesh(world, world.size).layout, keep=2)
    assert manager.resume("auto") is None
    with BackgroundSaver(manager) as saver:
        told = train(saver, world)
        saver.wait()
        told["exact"] = is_exact(folder, world, STEPS)
        told["failure"] = failure_on_rank_1(saver, world)
        told["still exact"] = is_exact(folder, world, STEPS)
        told["goes on"] = goes_on_while_rank_1_is_slow(saver, world)
        told["exact again"] = is_exact(folder, world, STEPS + 2)
    return told


def test_ranks_save_beside_their_training(tmp_path: Path) -> None:
    for told in run_ranks(beside_a_training, 2, tmp_path):
        assert told["wrong"] == []
        assert told["overlapped"] > 0, "no step met a save: the test shows nothing"
        assert told["exact"] and told["still exact"] and told["exact again"]
        assert told["failure"].startswith("writing state on rank 1: OSError")
        assert told["goes on"]
