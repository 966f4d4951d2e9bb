"""What a model must not say about the tokens that pass its blocks, with which reason and remedy."""

import pytest

from moe_train.config.attention import GroupedQueryConfig, SwitchHeadConfig
from moe_train.config.depth import FullDepthConfig, MixtureOfDepthsConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.rules import model_problems
from moe_train.errors import Problem

BLOCKS = FFNConfig(num_experts=4, graph=GraphConfig(expert="block"))
NETWORKS = FFNConfig(num_experts=4, graph=GraphConfig())


def problems(depth: dict[str, object] | None = None, **fields: object) -> list[Problem]:
    """Of a model of 6 layers."""
    made = MixtureOfDepthsConfig(**depth or {})  # type: ignore[arg-type]
    return list(model_problems(ModelConfig(**{"layers": 6, "depth": made, **fields})))  # type: ignore[arg-type]


POSSIBLE: dict[str, dict[str, object]] = {
    "as by default": {},
    "every block": {"depth": {"every": 1, "capacity": 1.0}},
    "a classifier": {"depth": {"causal": "classifier"}},
    "the last block alone": {"depth": {"every": 6}},
    "coupled networks": {"ffn": NETWORKS},
    "experts inside": {"ffn": FFNConfig(num_experts=4)},
    "experts in attention, and some that do nothing": {
        "attention": SwitchHeadConfig(), "ffn": FFNConfig(num_experts=4, num_noop_experts=2)
    },
    "windows in the other blocks": {"attention": GroupedQueryConfig(window=8, full_every=2)},
    "windows in other blocks, every fourth takes some": {
        "attention": GroupedQueryConfig(window=8, full_every=2), "depth": {"every": 4}
    },
    "blocks as experts, all tokens": {"ffn": BLOCKS, "depth": None},
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_is_possible(name: str) -> None:
    given = dict(POSSIBLE[name])
    if given.get("depth", 0) is None:
        assert list(model_problems(ModelConfig(layers=6, ffn=BLOCKS, depth=FullDepthConfig()))) == []
        return
    assert problems(**given) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "key", "reason"),
    [
        (
            {"depth": {"every": 7}},
            "model.depth.every",
            "leaves no block that only some tokens pass among model.layers=6",
        ),
        ({"depth": {"causal": "classifier", "predictor_dim": 3}}, "model.depth.predictor_dim", "causal is classifier"),
        ({"ffn": BLOCKS}, "model.depth.kind", "see whole sequences of all ranks at the same positions"),
        ({"attention": GroupedQueryConfig(window=8)}, "model.attention.window", "counts positions"),
        ({"attention": GroupedQueryConfig(window=8, full_every=4)}, "model.attention.window", "counts positions"),
        (
            {"attention": GroupedQueryConfig(window=8, full_every=2), "depth": {"every": 3}},
            "model.attention.window",
            "counts positions",
        ),
    ],
)
def test_what_is_not(given: dict[str, object], key: str, reason: str) -> None:
    (problem,) = problems(**given)  # type: ignore[arg-type]
    assert problem.key == key and reason in problem.rule and problem.remedy


def test_all_problems_at_once() -> None:
    found = problems({"causal": "classifier", "predictor_dim": 3}, ffn=BLOCKS, attention=GroupedQueryConfig(window=8))
    assert {p.key for p in found} == {"model.depth.predictor_dim", "model.depth.kind", "model.attention.window"}
