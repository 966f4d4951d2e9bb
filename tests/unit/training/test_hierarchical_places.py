"""Experts of a hierarchical router stay on the ranks of their group, whatever their loads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.model import FFNConfig
from moe_train.moe.packing import choose_places
from moe_train.training.placement import blocks_of


def ffn_of(groups: int, num_experts: int = 16) -> FFNConfig:
    router = {"kind": "hierarchical", "groups": groups}
    return FFNConfig.model_validate({"num_experts": num_experts, "router": router})


@pytest.mark.parametrize(
    ("groups", "ep", "blocks"), [(4, 4, 4), (4, 2, 2), (8, 2, 2), (2, 4, 2), (4, 8, 4), (4, 1, 1), (2, 2, 2)]
)
def test_blocks_are_the_groups_or_the_ranks_that_hold_several(groups: int, ep: int, blocks: int) -> None:
    assert blocks_of(ffn_of(groups), ep) == blocks


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]), st.lists(st.integers(0, 99), min_size=16, max_size=16))
def test_a_token_visits_no_more_ranks_after_experts_moved(groups: int, ep: int, loads: list[int]) -> None:
    places = choose_places(loads, range(16), ep, blocks_of(ffn_of(groups), ep))
    size, held = 16 // groups, 16 // ep
    for group in range(groups):
        ranks = {places.index(expert) // held for expert in range(group * size, (group + 1) * size)}
        assert len(ranks) == max(1, ep // groups)


def test_within_a_group_of_several_ranks_experts_move() -> None:
    loads = [100, 100, 0, 0] + [10] * 12
    places = choose_places(loads, range(16), 8, blocks_of(ffn_of(4), 8))
    assert places != list(range(16)) and sorted(places[:4]) == [0, 1, 2, 3]
