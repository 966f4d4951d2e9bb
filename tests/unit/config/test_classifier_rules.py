"""What a classifier, or a language model, must not say about its head, with which reason and remedy."""

import pytest

from moe_train.config.attention import GroupedQueryConfig, LatentConfig
from moe_train.config.balance import BalanceConfig, LossFreeConfig
from moe_train.config.classifier import ExpertHeadConfig, LinearHeadConfig
from moe_train.config.classifier_rules import classifier_problems, task_problems
from moe_train.config.compose import compose_config
from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig, MTPConfig
from moe_train.config.routing import (
    ExpertChoiceRouterConfig,
    FactorCapacityConfig,
    HashRouterConfig,
    TopKSoftmaxRouterConfig,
)
from moe_train.config.rules import layout_problems, model_problems
from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.errors import Problem

WHOLE = GroupedQueryConfig(causal=False)
LINEAR, EXPERTS = LinearHeadConfig(), ExpertHeadConfig()
FOUR = FFNConfig(num_experts=4)


def problems(**fields: object) -> list[Problem]:
    return list(classifier_problems(ModelConfig(**fields)))  # type: ignore[arg-type]


def ffn(**fields: object) -> FFNConfig:
    return FFNConfig(num_experts=4, **fields)  # type: ignore[arg-type]


POSSIBLE: dict[str, dict[str, object]] = {
    "a language model": {},
    "an encoder": {"classifier": LINEAR, "attention": WHOLE, "ffn": FOUR},
    "a causal trunk": {"classifier": LINEAR, "ffn": FOUR},
    "latent attention": {"classifier": LINEAR, "attention": LatentConfig()},
    "a dense encoder": {"classifier": LINEAR, "attention": WHOLE},
    "no block": {"classifier": EXPERTS, "layers": 0, "ffn": ffn(router=TopKSoftmaxRouterConfig(gate_dim=8))},
    "no block, though no head would be as wide": {"classifier": EXPERTS, "layers": 0, "dim": 21, "ffn": FOUR},
    "experts in blocks and in the head": {"classifier": EXPERTS, "attention": WHOLE, "ffn": FOUR},
    "experts in the head alone": {"classifier": EXPERTS, "layers": 2, "ffn": ffn(first_dense=2)},
    "moved biases in the head": {
        "classifier": EXPERTS, "layers": 0, "ffn": ffn(balance=BalanceConfig(loss_free=LossFreeConfig()))
    },
    "hash in blocks": {"classifier": LINEAR, "ffn": ffn(router=HashRouterConfig())},
    "coupled networks": {"classifier": LINEAR, "attention": WHOLE, "ffn": ffn(graph=GraphConfig())},
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_is_possible(name: str) -> None:
    assert list(model_problems(ModelConfig(**POSSIBLE[name]))) == []  # type: ignore[arg-type]


MISTAKES: dict[str, tuple[dict[str, object], str, str]] = {
    "no block": ({"layers": 0}, "model.layers", "only a head with experts"),
    "sees the next token": ({"attention": WHOLE}, "model.attention.causal", "would see the next one"),
    "no block, linear": ({"classifier": LINEAR, "layers": 0}, "model.layers", "only a head with experts is left"),
    "own output": ({"classifier": LINEAR, "tie_embeddings": False}, "model.tie_embeddings", "no output over tokens"),
    "looks ahead": ({"classifier": LINEAR, "mtp": MTPConfig(depth=1)}, "model.mtp.depth", "predicts no tokens"),
    "depth": ({"classifier": LINEAR, "depth": MixtureOfDepthsConfig()}, "model.depth.kind", "differ in length"),
    "experts choose": (
        {"classifier": LINEAR, "ffn": ffn(router=ExpertChoiceRouterConfig(allow_future_leak=True))},
        "model.ffn.router.kind", "differ in length",
    ),
    "hash in the head": (
        {"classifier": EXPERTS, "ffn": ffn(router=HashRouterConfig())}, "model.ffn.router.kind", "no number",
    ),
    "idle experts": ({"classifier": LINEAR, "ffn": ffn(num_noop_experts=1)}, "model.ffn.num_noop_experts", "by class"),
    "one class": ({"classifier": LinearHeadConfig(num_classes=1)}, "model.classifier.num_classes", "nothing to tell"),
    "window": (
        {"classifier": LINEAR, "attention": GroupedQueryConfig(causal=False, window=4)},
        "model.attention.window", "of causal attention",
    ),
    "sinks": (
        {"classifier": LINEAR, "attention": GroupedQueryConfig(causal=False, sinks=True)},
        "model.attention.sinks", "of causal attention",
    ),
    "blocks as experts": (
        {"classifier": LINEAR, "attention": WHOLE, "ffn": ffn(graph=GraphConfig(expert="block"))},
        "model.ffn.graph.expert", "padding",
    ),
    "no experts": ({"classifier": EXPERTS}, "model.ffn.num_experts", "they have none"),
    "shared experts": (
        {"classifier": EXPERTS, "ffn": ffn(num_shared_experts=1)}, "model.ffn.num_shared_experts", "has classes",
    ),
    "coupled": ({"classifier": EXPERTS, "ffn": ffn(graph=GraphConfig())}, "model.ffn.graph", "texts choose them"),
    "capacity": (
        {"classifier": EXPERTS, "ffn": ffn(capacity=FactorCapacityConfig())}, "model.ffn.capacity.kind", "no class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not(name: str) -> None:
    given, key, reason = MISTAKES[name]
    (problem,) = problems(**given)
    assert problem.key == key and reason in problem.rule and problem.remedy


def test_all_problems_at_once() -> None:
    attention = GroupedQueryConfig(causal=False, window=4, sinks=True)
    found = problems(classifier=LINEAR, layers=0, tie_embeddings=False, mtp=MTPConfig(depth=1), attention=attention)
    assert {p.key for p in found} == {
        "model.layers", "model.tie_embeddings", "model.mtp.depth", "model.attention.window", "model.attention.sinks"
    }  # fmt: skip


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("has_head", [True, False])
def test_task_and_head_belong_together(tells: bool, has_head: bool) -> None:
    words = ["model=moe_classifier"] if has_head else []
    config = compose_config("train", TrainConfig, lambda config: [], words)
    if tells:
        config = config.model_copy(update={"task": SentimentTask()})
    found = [problem.key for problem in task_problems(config)]
    assert found == ([] if tells == has_head else ["model.classifier" if tells else "task.kind"])


def test_there_are_no_logits_to_cut() -> None:
    words = ["model=moe_classifier", "train.loss_chunk=64"]
    config = compose_config("train", TrainConfig, lambda config: [], words)
    config = config.model_copy(update={"task": SentimentTask()})
    assert [problem.key for problem in task_problems(config)] == ["train.loss_chunk"]


def test_ranks_divide_the_experts_of_a_head_too() -> None:
    model = ModelConfig(classifier=EXPERTS, layers=0, ffn=FOUR)
    assert list(layout_problems(2, 4, 2, model)) == []
    assert [p.key for p in layout_problems(3, 4, 3, model)] == ["parallel.ep"]
