"""The task chooses texts and model that go with it; what the command line says wins, and so does an experiment."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from moe_train.config.compose import compose_config, register
from moe_train.config.groups import config_dir, options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError


def composed(*overrides: str) -> TrainConfig:
    return compose_config("train", TrainConfig, train_problems, list(overrides))


def kinds(config: TrainConfig) -> tuple[str, str, str | None, int]:
    head = config.model.classifier
    return config.task.kind, config.data.source, None if head is None else head.kind, config.model.layers


def test_without_a_word_a_language_is_learnt() -> None:
    assert kinds(composed()) == ("language", "shakespeare", None, 4)
    assert kinds(composed("task=language")) == kinds(composed())


def test_the_task_alone_is_a_whole_run() -> None:
    config = composed("task=sentiment")
    assert kinds(config) == ("sentiment", "vader", "linear", 1) and config.data.heldout_fraction == 0.1


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_user_chooses_wins_in_any_order(order: int) -> None:
    words = ["task=sentiment", "data=imdb", "model=moe_classifier"][::order]
    assert kinds(composed(*words)) == ("sentiment", "imdb", "experts", 0)


@pytest.mark.parametrize("source", ["vader", "rotten_tomatoes", "imdb"])
def test_recipes_name_their_texts_and_may_be_overridden(source: str) -> None:
    config = composed(f"experiment=sentiment_{source}")
    assert kinds(config) == ("sentiment", source, "linear", 1) and config.data.heldout_fraction == 0.1
    assert kinds(composed(f"experiment=sentiment_{source}", "model=moe_classifier"))[2:] == ("experts", 0)


@pytest.mark.parametrize("source", ["vader", "rotten_tomatoes", "imdb"])
def test_variants_of_the_study_differ_in_what_they_say(source: str) -> None:
    plain, alone, small, small_alone = (
        composed("experiment=sentiment_study", "run.seed=2", f"study=sentiment_{source}{ending}")
        for ending in ("", "_alone", "_small", "_small_alone")
    )
    assert [kinds(config)[1:] for config in (plain, small)] == [(source, "linear", 1), (source, "experts", 0)]
    for with_loss, without in ((plain, alone), (small, small_alone)):
        assert with_loss.model.ffn.balance.aux is not None and without.model.ffn.balance.aux is None
        ffn = with_loss.model.ffn.model_copy(update={"balance": without.model.ffn.balance})
        assert with_loss.model.model_copy(update={"ffn": ffn}) == without.model
        assert with_loss.model_copy(update={"model": without.model}) == without
    assert {config.run.name for config in (plain, alone, small, small_alone)} == {"sentiment_study"}
    assert plain.data.split_seed == 2 and plain.log.wandb.mode == "disabled"


def test_the_study_runs_every_variant_once() -> None:
    register("train", TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        hydra = compose("train", overrides=["experiment=sentiment_study"], return_hydra_config=True).hydra
    swept = [name.strip() for name in hydra.sweeper.params["study"].split(",")]
    assert sorted(swept) == [name for name in options_of("study") if name.startswith("sentiment_")]
    assert str(hydra.sweeper.params["run.seed"]) == "0,1,2" and "study" in hydra.callbacks


def test_a_task_and_a_model_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        composed("task=sentiment", "model=sparse_tiny", "data=shakespeare")
    assert {problem.key for problem in caught.value.problems} == {"model.classifier", "data.source"}
