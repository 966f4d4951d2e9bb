"""One process as a world, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    alone = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), alone):
        yield alone


@pytest.fixture(scope="module")
def mesh(world: World) -> Mesh:
    return build_mesh(world, 1)
