"""What a run of one's own gives to another model: the plan by names and shapes, and whose heads are alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.interop.from_run import Taking, other_tokenizer, plan, same_head, told

OURS = {"model.embedding_VD": (8, 4), "model.norm.weight": (4,), "model.head.weight": (3, 4), "model.head.bias": (3,)}


def config_of(*overrides: str, classes: tuple[str, ...] | None = None) -> TrainConfig:
    config = compose_config("train", TrainConfig, lambda config: [], list(overrides))
    return config if classes is None else config.model_copy(update={"task": SentimentTask(classes=classes)})


def test_what_is_alike_is_taken_and_the_rest_named() -> None:
    saved = {"model.embedding_VD": (8, 4), "model.norm.weight": (4,), "model.mtp.0.norm.weight": (4,), "optim.x": (9,)}
    taking, problems = plan(OURS, saved, takes_head=True)
    assert not problems
    assert taking == Taking(
        taken=("model.embedding_VD", "model.norm.weight"),
        fresh=("model.head.bias", "model.head.weight"),
        left=("model.mtp.0.norm.weight",),
    )
    sentence = told(Path("runs/lm"), 120, taking)
    assert "step 120 of runs/lm: 2 tensors are taken" in sentence
    assert (
        "head.bias, head.weight begin with random values" in sentence and "mtp.0.norm.weight are not used" in sentence
    )


def test_a_head_of_something_else_is_left_whatever_its_shape() -> None:
    saved = {**OURS, "model.head.weight": (8, 4)}
    taking, problems = plan(OURS, saved, takes_head=False)
    assert not problems and taking.fresh == ("model.head.bias", "model.head.weight") == taking.left
    taking, problems = plan(OURS, OURS, takes_head=True)
    assert taking.taken == tuple(sorted(OURS)) and not problems


def test_what_only_the_own_texts_tell_is_never_taken() -> None:
    """Log-count ratios and ratings are of the run's own files, and weights are of these: whatever their shape."""
    features = {"model.naive_bayes.weight_NC": (9, 3), "model.naive_bayes.ratios_NC": (9, 3)}
    features |= {"model.lexicon.weight_NC": (2, 3), "model.lexicon.hashes_N": (9,), "model.lexicon.ratings_N": (9,)}
    for saved in ({**OURS, **features}, {**OURS, "model.naive_bayes.weight_NC": (7, 2)}):
        taking, problems = plan({**OURS, **features}, saved, takes_head=True)
        assert not problems
        assert taking == Taking(taken=tuple(sorted(OURS)), fresh=tuple(sorted(features)), left=())


def test_every_other_shape_is_refused_at_once() -> None:
    saved = {"model.embedding_VD": (9, 4), "model.norm.weight": (5,), "model.head.weight": (3, 4)}
    _, problems = plan(OURS, saved, takes_head=True)
    assert [problem.key for problem in problems] == ["embedding_VD", "norm.weight"]
    assert "has shape (9, 4) in model.init_from, not (8, 4)" in str(problems[0])


def test_nothing_in_common_is_refused() -> None:
    _, problems = plan(OURS, {"model.other": (1,), "optim.norm.weight": (4,)}, takes_head=True)
    assert [problem.key for problem in problems] == ["model.init_from"]


def test_heads_are_alike_when_they_score_the_same() -> None:
    language = config_of()
    two, other, reversed_ = (
        config_of("task=sentiment", classes=classes) for classes in (("a", "b"), ("a", "c"), ("b", "a"))
    )
    assert same_head(language, config_of("model=dense_tiny")) and same_head(two, two)
    for ours, theirs in ((language, two), (two, language), (two, other), (two, reversed_)):
        assert not same_head(ours, theirs)


def test_the_remedy_for_another_tokenizer_can_be_typed() -> None:
    problem = other_tokenizer(Path("runs/lm"))
    assert problem.remedy == "set tokenizer.kind=file tokenizer.path=runs/lm/tokenizer.json"
    config_of("tokenizer.kind=file", "tokenizer.path=runs/lm/tokenizer.json")


@pytest.mark.parametrize("many", [8, 30])
def test_long_lists_are_cut(many: int) -> None:
    sentence = told(Path("r"), 1, Taking(("model.a",), tuple(f"model.b{i}" for i in range(many)), ()))
    assert ("and 22 more" in sentence) == (many == 30)
