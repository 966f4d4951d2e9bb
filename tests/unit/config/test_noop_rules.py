"""What experts that do nothing go with, and where groups of experts can be ranks."""

from __future__ import annotations

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.placement_rules import placement_problems
from moe_train.config.routing_rules import NO_NOOP, group_layout_problems, routing_problems
from moe_train.config.rules import expert_problems, train_problems
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError, Problem

KEY = "model.ffn.num_noop_experts"
GOOD = ("topk", "topk_softmax", "sigmoid", "switch", "noisy_topk")
TOP_K = {"switch": 1, "base": 1}


def problems_of(router: str, **ffn: object) -> list[Problem]:
    """Of a model with no-op experts."""
    leak = {"allow_future_leak": True} if router == "expert_choice" else {}
    sections = {"num_experts": 8, "top_k": TOP_K.get(router, 2), "num_noop_experts": 2} | ffn
    balance = {"aux": {}} | dict(ffn.get("balance", {})) if router == "hierarchical" else ffn.get("balance", {})
    sections |= {"router": {"kind": router, **leak}, "balance": balance}
    return list(expert_problems(ModelConfig.model_validate({"ffn": sections})))


@pytest.mark.parametrize("router", GOOD)
def test_routers_that_score_each_expert_by_itself_may_have_them(router: str) -> None:
    assert problems_of(router) == []


@pytest.mark.parametrize("router", NO_NOOP)
def test_others_say_why_not(router: str) -> None:
    (problem,) = problems_of(router)
    assert (problem.key, problem.value) == (KEY, 2)
    assert router in problem.rule and NO_NOOP[router] in problem.rule
    assert problems_of(router, num_noop_experts=0) == []


def test_every_router_is_named_once() -> None:
    kinds = {"gshard", "group_limited", "expert_choice", "hash", "sinkhorn", "base", "hierarchical"}
    assert set(NO_NOOP) == kinds and not kinds & set(GOOD)


def test_what_counts_by_devices_does_not_know_them() -> None:
    sections = {"balance": {"device": {}, "communication": {}}, "capacity": {"kind": "device"}}
    found = problems_of("topk", **sections)
    assert [problem.key for problem in found] == [
        "model.ffn.balance.device", "model.ffn.balance.communication", "model.ffn.capacity.kind",
    ]  # fmt: skip


@pytest.mark.parametrize("ffn", [{"num_experts": 0}, {"graph": {}, "router": {"kind": "topk"}}])
def test_without_a_choice_of_experts_there_is_none_against_it(ffn: dict[str, object]) -> None:
    model = ModelConfig.model_validate({"ffn": {"num_experts": 4, "num_noop_experts": 1, **ffn}})
    assert KEY in [problem.key for problem in expert_problems(model)]


def test_one_expert_and_one_that_does_nothing_are_a_choice() -> None:
    ffn = {"num_experts": 1, "top_k": 1, "num_noop_experts": 1}
    one = ModelConfig.model_validate({"ffn": {**ffn, "router": {"kind": "topk"}}}).ffn
    assert [problem.key for problem in routing_problems(one)] == ["model.ffn.router.normalize"]


def hierarchical(*keys: str) -> TrainConfig:
    """The preset, checked by no rule."""
    return compose_config("train", TrainConfig, lambda config: [], ["model=hierarchical_tiny", *keys])


@pytest.mark.parametrize(("groups", "ep", "is_good"), [(4, 4, True), (4, 2, True), (2, 4, True), (4, 1, True),
                                                       (6, 4, False), (4, 6, False), (3, 2, False)])  # fmt: skip
def test_groups_divide_the_ranks_or_the_reverse(groups: int, ep: int, is_good: bool) -> None:
    ffn = hierarchical("model.ffn.num_experts=24", f"model.ffn.router.groups={groups}").model.ffn
    found = list(group_layout_problems(ffn, ep))
    assert (found == []) is is_good
    assert all(problem.key == "parallel.ep" and str(groups) in problem.rule for problem in found)
    topk = compose_config("train", TrainConfig, lambda config: [], ["model=sparse_tiny"]).model.ffn
    assert list(group_layout_problems(topk, 3)) == []


def test_the_door_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    keys = ["model=hierarchical_tiny", "model.ffn.num_experts=24", "parallel.ep=6", "train.global_batch=12"]
    with pytest.raises(ConfigError, match="groups would lie across ranks"):
        compose_config("train", TrainConfig, train_problems, keys)


@pytest.mark.parametrize(("groups", "ep", "moves"), [(4, 4, False), (4, 2, False), (2, 4, True)])
def test_experts_that_may_not_leave_their_rank_have_nowhere_to_move(groups: int, ep: int, moves: bool) -> None:
    keys = (f"parallel.ep={ep}", "parallel.placement=auto", f"model.ffn.router.groups={groups}")
    found = list(placement_problems(hierarchical(*keys), ep))
    assert (found == []) is moves
    assert all("groups" in problem.rule for problem in found)
