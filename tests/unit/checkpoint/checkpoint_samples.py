"""One process with its process group, and a small state whose values say at which step it was saved."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from part_samples import values_of
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World, joined

NUM_EXPERTS = 4
EXPERT_KEYS = frozenset({"model.experts.w", "optim.experts.w.exp_avg"})


@dataclass(frozen=True)
class Lone:
    """A world of one process."""

    world: World
    mesh: Mesh

    def manager(self, folder: Path, keep: int = 2) -> CheckpointManager:
        return CheckpointManager(folder, self.world, self.mesh.layout, keep)


@pytest.fixture(scope="module")
def lone() -> Iterator[Lone]:
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        yield Lone(world, build_mesh(world, 1))


def make_state(step: int) -> CheckpointState:
    torch.manual_seed(step)
    tensors = {
        "model.embed": torch.randn(500, 3)[10:15],  # part of a larger buffer, as flat parameter storage makes it
        "model.experts.w": torch.randn(NUM_EXPERTS, 3, 2, dtype=torch.float64),
        "optim.experts.w.exp_avg": torch.randn(NUM_EXPERTS, 3, 2),
        "optim.experts.w.step": torch.tensor(float(step)),
    }
    return CheckpointState(parts(tensors), {"step": step, "tokens": step * 10}, f"random {step}".encode())


@pytest.fixture
def state_at() -> Callable[[int], CheckpointState]:
    return make_state


def parts(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    return {
        key: Part.of_experts(tensor, range(len(tensor)), len(tensor)) if key in EXPERT_KEYS else Part.whole(tensor)
        for key, tensor in tensors.items()
    }


def zeros_like(state: CheckpointState) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in values_of(state.parts).items()}
