"""Which runs cannot have their experts moved, with reason and remedy; and which can."""

from __future__ import annotations

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.placement_rules import placement_problems
from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem

AUTO = ("parallel.placement=auto", "parallel.ep=2")


def problems(*overrides: str) -> list[Problem]:
    config = compose_config("train", TrainConfig, lambda config: [], [*overrides])
    return list(placement_problems(config, world_size=4))


@pytest.mark.parametrize(
    "overrides",
    [
        AUTO,
        (*AUTO, "parallel.ep=4"),
        (*AUTO, "model/ffn/capacity=factor"),
        (*AUTO, "parallel.dp_shard=2"),
        ("parallel.ep=1", "checkpoint.every=0"),
        ("parallel.placement=fixed", "model=graph_tiny"),
    ],
    ids=" ".join,
)
def test_what_can_be(overrides):
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "rule", "remedy"),
    [
        (("parallel.ep=1",), "every rank holds all experts", "raise parallel.ep"),
        (("parallel.ep=8", "model.ffn.num_experts=8"), "holds one expert", "lower parallel.ep"),
        (("model=graph_tiny",), "do not choose", "leave it out"),
        (("model.ffn.num_experts=0",), "do not choose", "leave it out"),
        (("checkpoint.every=0",), "there are none: checkpoint.every=0", "set checkpoint.every"),
        (("checkpoint.async=true",), "those written beside training are older", "set checkpoint.async=false"),
        (("model/ffn/capacity=factor", "model.ffn.capacity.pad=true"), "buffers of fixed size", "capacity.pad=false"),
        (("model/ffn/capacity=device",), "devices that hold consecutive experts", "another model/ffn/capacity"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be(overrides, rule, remedy):
    (problem,) = problems(*AUTO, *overrides)
    assert (problem.key, problem.value) == ("parallel.placement", "auto")
    assert rule in problem.rule and remedy in problem.remedy


def test_every_problem_is_told_at_once():
    assert len(problems("parallel.placement=auto", "checkpoint.every=0", "checkpoint.async=true")) == 3
