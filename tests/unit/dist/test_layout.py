"""Arithmetic of ranks, for every world size and EP size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.dist.mesh import Layout

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    ep, replicas = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    return Layout(ep * replicas, ep)


@QUICK
@given(layouts())
def test_both_kinds_of_groups_partition_the_world(layout: Layout) -> None:
    for groups, size in (
        (layout.ep_groups(), layout.ep),
        (layout.edp_groups(), layout.world_size // layout.ep),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}
        assert all(group == sorted(group) for group in groups)


@QUICK
@given(layouts())
def test_two_groups_of_different_kinds_share_one_rank(layout: Layout) -> None:
    for ep_group in layout.ep_groups():
        for edp_group in layout.edp_groups():
            assert len(set(ep_group) & set(edp_group)) == 1


@QUICK
@given(layouts(), st.integers(1, 4))
def test_an_ep_group_holds_each_expert_once_and_replicas_hold_the_same(layout: Layout, held: int) -> None:
    num_experts = layout.ep * held
    for group in layout.ep_groups():
        experts = [expert for rank in group for expert in layout.experts(rank, num_experts)]
        assert experts == list(range(num_experts)), "in order of place, so that gathered shards are the whole tensor"
    for group in layout.edp_groups():
        assert len({layout.experts(rank, num_experts) for rank in group}) == 1


def test_exchange_partners_are_neighbours() -> None:
    assert Layout(8, 4).ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Layout(8, 4).edp_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_what_does_not_divide_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="ep=3 must divide the 8 ranks"):
        Layout(8, 3)
    with pytest.raises(AssertionError, match="ep=4 must divide the 6 experts"):
        Layout(8, 4).experts(0, 6)
