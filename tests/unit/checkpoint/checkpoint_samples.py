"""One process with its process group, and a small state whose values say at which step it was saved."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined

EXPERT_KEYS = frozenset({"model.experts.w", "optim.experts.w.exp_avg"})


@dataclass(frozen=True)
class Lone:
    """A world of one process."""

    world: World
    mesh: Mesh

    def manager(self, folder: Path, keep: int = 2) -> CheckpointManager:
        return CheckpointManager(folder, self.world, self.mesh, keep)


@pytest.fixture(scope="module")
def lone() -> Iterator[Lone]:
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        yield Lone(world, build_mesh(world, 1))


def make_state(step: int) -> CheckpointState:
    torch.manual_seed(step)
    tensors = {
        "model.embed": torch.randn(500, 3)[10:15],  # part of a larger buffer, as flat parameter storage makes it
        "model.experts.w": torch.randn(4, 3, 2, dtype=torch.float64),
        "optim.experts.w.exp_avg": torch.randn(4, 3, 2),
        "optim.experts.w.step": torch.tensor(float(step)),
    }
    return CheckpointState(tensors, EXPERT_KEYS, {"step": step, "tokens": step * 10}, f"random {step}".encode())


@pytest.fixture
def state_at() -> Callable[[int], CheckpointState]:
    return make_state


def zeros_like(state: CheckpointState) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in state.tensors.items()}
