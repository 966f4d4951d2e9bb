"""Which ranks share weights: arithmetic, for every world, EP and shard size."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.dist.mesh import Layout

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    world_size = draw(st.integers(1, 36))
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    return Layout(world_size, draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors)))


def group_of(rank: int, groups: list[list[int]]) -> list[int]:
    (found,) = (group for group in groups if rank in group)
    return found


@QUICK
@given(layouts())
def test_all_groups_partition_the_world(layout: Layout) -> None:
    world_size, ep, expert_shard = layout.world_size, layout.ep, layout.expert_shard
    for groups, size in (
        (layout.shard_groups(), layout.dp_shard),
        (layout.replica_groups(), world_size // layout.dp_shard),
        (layout.expert_shard_groups(), expert_shard),
        (layout.expert_replica_groups(), world_size // ep // expert_shard),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        assert {len(group) for group in groups} == {size}


@QUICK
@given(layouts())
def test_shards_and_replicas_together_are_those_who_hold_the_same(layout: Layout) -> None:
    for rank in range(layout.world_size):
        for shards, replicas, holders in (
            (layout.shard_groups(), layout.replica_groups(), list(range(layout.world_size))),
            (layout.expert_shard_groups(), layout.expert_replica_groups(), group_of(rank, layout.edp_groups())),
        ):
            place = group_of(rank, shards).index(rank)
            others = group_of(rank, replicas)
            assert all(group_of(other, shards).index(other) == place for other in others), "the same shard"
            assert sorted(r for other in others for r in group_of(other, shards)) == holders


def test_shards_are_neighbours() -> None:
    layout = Layout(8, 2, 4)
    assert layout.shard_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.replica_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.expert_shard_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.expert_replica_groups() == [[0], [2], [4], [6], [1], [3], [5], [7]]
    assert Layout(8, 4, 8).expert_shard_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
