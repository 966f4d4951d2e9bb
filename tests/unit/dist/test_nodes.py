"""Arithmetic of nodes, for every size, and the groups in a real world."""

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from spawn import run_ranks

from moe_train.dist.mesh import Layout, build_mesh
from moe_train.dist.nodes import Nodes, build_node_groups, launched_node_size
from moe_train.dist.world import World


@st.composite
def nodes(draw: st.DrawFn) -> Nodes:
    size, per_group, replicas = draw(st.integers(1, 8)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    return Nodes(Layout(size * per_group * replicas, size * per_group), size)


@settings(max_examples=40, deadline=None)
@given(nodes())
def test_node_and_rail_of_a_rank_meet_in_it_alone_and_span_its_ep_group(nodes: Nodes) -> None:
    for group in nodes.layout.ep_groups():
        for rank in group:
            (node,) = [ranks for ranks in nodes.node_groups() if rank in ranks]
            (rail,) = [ranks for ranks in nodes.rail_groups() if rank in ranks]
            assert set(node) & set(rail) == {rank}
            assert {nodes.size * (a // nodes.size) + b % nodes.size for a in rail for b in node} == set(group)
            assert (node, rail) == (sorted(node), sorted(rail)), "runs of experts follow the ranks"


@pytest.mark.parametrize(("ep", "size"), [(4, 4), (4, 8), (6, 4)])
def test_groups_that_fill_no_two_nodes_have_none(ep: int, size: int) -> None:
    with pytest.raises(AssertionError, match="do not divide"):
        Nodes(Layout(24, ep), size)


def groups_of(world: World) -> tuple[list[int], list[int]]:
    groups = build_node_groups(build_mesh(world, 4), 2, timeout_s=20.0)
    return tuple(dist.get_process_group_ranks(group) for group in (groups.node, groups.rail))


def test_groups_of_four_ranks() -> None:
    assert run_ranks(groups_of, 4) == [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]


def test_node_size_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launched_node_size(6) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert launched_node_size(6) == 3
