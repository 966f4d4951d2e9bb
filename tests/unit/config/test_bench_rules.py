"""Configurations of benchmarks: what composes, and what is refused, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.bench import (
    SHAPES,
    BenchConfig,
    ClusterBench,
    ExchangeBench,
    LayerBench,
    ModelBench,
    ScalingBench,
)
from moe_train.config.bench_rules import bench_problems
from moe_train.config.compose import compose_config, unstated
from moe_train.config.groups import options_of
from moe_train.errors import ConfigError

KINDS = {
    "layer": LayerBench,
    "model": ModelBench,
    "exchange": ExchangeBench,
    "cluster": ClusterBench,
    "scaling": ScalingBench,
}
WIDE_CHOICE = "bench.shapes=[{experts: 4, top_k: 9, expert_dim: 8}]"


def compose(*overrides: str) -> BenchConfig:
    return compose_config("bench", BenchConfig, bench_problems, list(overrides))


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides)
    return [str(problem) for problem in caught.value.problems]


def test_there_is_an_option_for_each_suite() -> None:
    assert options_of("bench") == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_suite_starts_from_its_own_defaults_however_it_is_chosen(kind: str) -> None:
    assert compose(f"bench={kind}").bench == compose(f"bench.kind={kind}").bench == KINDS[kind]()


def test_the_layer_is_the_default() -> None:
    assert compose() == BenchConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_all_keys_are_shown_and_may_be_given_back(kind: str) -> None:
    shown = unstated("bench", BenchConfig, [f"bench={kind}"])
    assert shown
    assert compose(f"bench={kind}", *shown).bench == KINDS[kind]()


def test_shapes_on_the_command_line() -> None:
    config = compose("bench.shapes=[{experts: 4, top_k: 2, expert_dim: 8}]", "bench.routing=[zipf]", "rounds=2")
    assert isinstance(config.bench, LayerBench)
    assert [shape.experts for shape in config.bench.shapes] == [4]
    assert (config.bench.routing, config.rounds) == (("zipf",), 2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["bench.peers=[torchtitam]"], "must be one of 'transformers_eager'"),
        (["bench.peers=[deepspeed,deepspeed]"], "bench.peers=[deepspeed,deepspeed]: names something twice"),
        (["bench.shapes=[{experts: 4, top_k: 1, expert_dim: 8}]"], "with one expert per token deepspeed"),
        ([WIDE_CHOICE], "bench.shapes=top_k=9: there are 4 experts"),
        (["bench.shapes=[]"], "bench.shapes"),
        (["bench=model", WIDE_CHOICE], "there are 4 experts"),
        (["bench=model", "bench.peers=[deepspeed]"], "is a layer only"),
        (["bench=model", "bench.heads=3"], "heads of even width must make up bench.dim=512"),
        (["bench=model", "bench.tokens=3"], "does not apply to kind=model"),
        (["bench=exchange", "bench.ranks=3"], "must divide the 8 experts"),
        (["bench=exchange", "bench.ranks=4", "bench.node_size=3"], "must divide bench.ranks=4"),
        (["bench=cluster", "bench.ranks=[16]", "bench.batch=16"], "must divide the 8 experts"),
        (["bench=cluster", "bench.batch=7"], "must divide bench.batch=7"),
        (["bench=scaling", "bench.top_k=9"], "a curve has 8 experts"),
        (["rounds=0"], "should be greater than 0"),
        (["bench.rounds=3"], "bench.rounds=3: is not a key"),
    ],
)
def test_what_is_refused(overrides: list[str], told: str) -> None:
    assert any(told in problem for problem in refused(*overrides)), refused(*overrides)


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    problems = refused("bench=model", "bench.heads=3", "bench.peers=[torchtitan]", WIDE_CHOICE, f"out={file}")
    assert len(problems) == 4
    assert any("is a file, not a folder" in problem for problem in problems)


def test_the_shapes_of_the_goals() -> None:
    assert [(shape.experts, shape.top_k, shape.expert_dim) for shape in SHAPES] == [
        (8, 2, 1024),
        (64, 6, 192),
        (128, 8, 128),
    ]
