"""Process groups are collective objects: ranks that make them in different orders wait for each other for ever."""

import pytest
import torch
import torch.distributed as dist

from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_trap_38_every_rank_makes_the_same_groups_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, ranks: int, ep: int
) -> None:
    made: list[list[list[list[int]]]] = []

    def new_groups(groups: list[list[int]], **options: object) -> tuple[object, list[object]]:
        made[-1].append([list(group) for group in groups])
        return object(), []

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_groups)
    with joined(dist.HashStore(), World(0, 1, torch.device("cpu"), 30.0)):
        for rank in range(ranks):
            made.append([])
            build_mesh(World(rank, ranks, torch.device("cpu"), 30.0), ep)
    assert all(calls == made[0] for calls in made)
    for groups in made[0]:
        assert sorted(rank for group in groups for rank in group) == list(range(ranks)), "each rank in one group"
