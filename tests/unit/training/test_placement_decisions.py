"""What is decided, said and read when experts move, one process alone; `test_placement_layouts` has several."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case, torch_engine
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.dist.mesh import Mesh
from moe_train.dist.parts import Part
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.record import LayerKey
from moe_train.training.placement import Decision, Places, Rebalancer, blocks_of, restricted
from moe_train.training.tally import Tally

EVEN, SKEWED = (10, 10, 10, 10), (30, 10, 5, 5)
STAYS = Places(EVEN, (0, 1, 2, 3), (0, 1, 2, 3), num_ranks=2)
MOVES = Places(SKEWED, (1, 0, 3, 2), (1, 3, 0, 2), num_ranks=2)


def counted(*counts: tuple[int, ...]) -> Tally:
    """A step in which these were the assignments of each layer's experts."""
    none = torch.zeros((), dtype=torch.int64)
    records = [RoutingRecord(none, torch.tensor(own), *[none] * 4, none.double(), statistics=()) for own in counts]
    return Tally({LayerKey(depth): None for depth in range(len(records))}, none.double(), list(records))


def test_a_decision_is_written_down_for_the_checkpoint_and_for_the_record() -> None:
    decision = Decision({"layer_01": MOVES, "layer_03": STAYS}, starts_anew=True)
    assert decision.moves and MOVES.moved == [1, 2] and STAYS.moved == []
    state = {"ep": 2, "placement": {"layer_01": [1, 3, 0, 2], "layer_03": [0, 1, 2, 3]}, "loads": {}}
    assert decision.state() == json.loads(json.dumps(decision.state())) == state
    event = decision.event(7)
    assert (event["kind"], event["step"], event["event"], event["ep"]) == ("event", 7, "placement", 2)
    assert event["experts"] == state["placement"] and event["moved"] == 2
    assert event["measured"] == {"layer_01": 1.6, "layer_03": 1.0}
    assert event["fixed"] == {"layer_01": 1.6, "layer_03": 1.0}
    assert event["predicted"] == {"layer_01": 1.4, "layer_03": 1.0}
    assert "1.30 times the mean" in event["message"] and "expected: 1.20" in event["message"]
    assert json.dumps(event)


def test_a_decision_to_stay_says_what_was_counted_so_far() -> None:
    decision = Decision({"layer_01": STAYS}, starts_anew=False)
    assert not decision.moves and decision.state()["loads"] == {"layer_01": [10, 10, 10, 10]}


@pytest.fixture
def rebalancer(lone_mesh: Mesh) -> Rebalancer:
    """Of two layers of four experts."""
    return Rebalancer(torch_engine(lone_mesh, Case("two layers"), "fp64"), lone_mesh)


def test_loads_add_up_over_steps_until_a_decision_is_carried_out(rebalancer: Rebalancer) -> None:
    assert rebalancer.loads() == [[0] * 4] * 2
    for _ in range(3):
        rebalancer.observe(counted((4, 3, 2, 1), (0, 0, 0, 7)))
    assert rebalancer.loads() == [[12, 9, 6, 3], [0, 0, 0, 21]]
    stays, chooses = rebalancer.decide(chooses=False), rebalancer.decide(chooses=True)
    assert stays.starts_anew is False and chooses.starts_anew is True
    assert not chooses.moves, "one rank has everything"
    rebalancer.carry_out(stays, None)
    assert rebalancer.loads()[0] == [12, 9, 6, 3], "still counting"
    assert rebalancer.carry_out(chooses, None) == 0
    assert rebalancer.loads() == [[0] * 4] * 2


def test_what_was_counted_is_restored_on_one_rank_and_goes_on(rebalancer: Rebalancer) -> None:
    saved = {"ep": 1, "placement": {"layer_00": [3, 1, 2, 0], "layer_01": [0, 1, 2, 3]},
             "loads": {"layer_00": [1, 2, 3, 4], "layer_01": [5, 6, 7, 8]}}  # fmt: skip
    assert rebalancer.restore(saved, is_leader=True)
    rebalancer.observe(counted((1, 1, 1, 1), (1, 1, 1, 1)))
    assert rebalancer.loads() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert [layer.placement.experts for layer in rebalancer.layers.values()] == [(3, 1, 2, 0), (0, 1, 2, 3)]
    assert rebalancer.restore(saved, is_leader=False) and rebalancer.loads() == [[0] * 4] * 2


@pytest.mark.parametrize("saved", [{}, {"ep": 2, "placement": {"layer_00": [1, 0, 2, 3]}, "loads": {}}], ids=str)
def test_of_another_layout_nothing_is_taken(rebalancer: Rebalancer, saved: dict) -> None:
    assert not rebalancer.restore(saved, is_leader=True)
    assert all(layer.placement.experts == (0, 1, 2, 3) for layer in rebalancer.layers.values())


@pytest.mark.parametrize(
    ("router", "ep", "blocks"),
    [
        ({"kind": "group_limited", "groups": 4}, 8, 4),
        ({"kind": "group_limited", "groups": 4}, 4, 1),
        ({"kind": "group_limited", "groups": 4}, 2, 1),
        ({"kind": "group_limited", "groups": 4}, 6, 1),
        ({"kind": "topk"}, 8, 1),
    ],
    ids=str,
)
def test_the_groups_of_a_router_stay_on_ranks_of_their_own(router: dict, ep: int, blocks: int) -> None:
    assert blocks_of(FFNConfig.model_validate({"num_experts": 24, "router": router}), ep) == blocks


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(6)), st.integers(1, 6), st.sets(st.integers(0, 5)))
def test_the_part_of_some_experts_is_all_of_theirs_and_nothing_else(order, held, wanted) -> None:
    values: Tensor = torch.arange(held * 2.0).view(held, 2)
    part = restricted(Part.of_experts(values, order[:held], 6), wanted)
    for box in part.boxes:
        box.values.fill_(-1.0)
    assert part.shape == (6, 2)
    assert [bool((row == -1.0).all()) for row in values] == [expert in wanted for expert in order[:held]]
    assert all(bool((row >= 0.0).all()) for row, expert in zip(values, order, strict=False) if expert not in wanted)
    offsets = sorted((box.offsets[0] + n) for box in part.boxes for n in range(len(box.values)))
    assert offsets == sorted(wanted & set(order[:held]))
