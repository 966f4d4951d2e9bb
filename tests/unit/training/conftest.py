"""What several tests of the training step need."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    """The groups of a process alone."""
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)
