"""What must work: presets, groups and single keys in any combination, and what they mean."""

import pytest
from pydantic import ValidationError

from moe_train.config.compose import compose_config, defaults_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import DroplessConfig, FactorCapacityConfig, TrainConfig
from moe_train.config.validate import validate


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def compose(*overrides: str) -> TrainConfig:
    return compose_config("train", TrainConfig, train_problems, list(overrides))


def test_the_default_run() -> None:
    config = compose()
    assert config.model.ffn.num_experts == 8
    assert config.data.source == "shakespeare"
    assert config.run.dir == "runs/default"


def test_the_run_folder_follows_the_name() -> None:
    assert compose("run.name=x").run.dir == "runs/x"
    assert compose("run.dir=/tmp/y").run.dir == "/tmp/y"


def test_another_kind_drops_what_the_preset_set_for_its_own() -> None:
    assert isinstance(compose("model=switch_tiny").model.ffn.capacity, FactorCapacityConfig)
    config = compose("model=switch_tiny", "model.ffn.capacity.kind=dropless")
    assert config.model.ffn.capacity == DroplessConfig()


def test_a_kind_may_be_chosen_with_its_fields() -> None:
    config = compose("model.ffn.capacity.kind=factor", "model.ffn.capacity.factor=2.0")
    assert config.model.ffn.capacity == FactorCapacityConfig(factor=2.0)


def test_a_nested_group_replaces_that_of_the_preset() -> None:
    config = compose("model=switch_tiny", "model/ffn/capacity=dropless", "model/ffn/balance=sequence")
    assert config.model.ffn.capacity == DroplessConfig()
    assert config.model.ffn.balance.aux is not None
    assert config.model.ffn.balance.aux.scope == "sequence"
    assert config.model.ffn.top_k == 1, "the rest of the preset stays"


def test_a_loss_is_switched_off_with_null() -> None:
    assert compose("model/ffn/balance=none").model.ffn.balance.aux is None
    assert compose("model.ffn.balance.z_loss=null").model.ffn.balance.z_loss is None


def test_plus_signs_of_hydra_users_are_accepted() -> None:
    assert compose("+train.steps=21", "++run.seed=3").train.steps == 21


def test_integers_are_fine_where_a_fraction_may_stand() -> None:
    assert compose("optim.lr=1").optim.lr == 1.0
    assert compose("optim.betas=[0.5,0.5]").optim.betas == (0.5, 0.5)


def test_ranks_of_the_launcher_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert compose("parallel.ep=4", "train.micro_batch=2").parallel.ep == 4


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        compose().train.steps = 3


def test_written_and_read_again_is_the_same() -> None:
    """The run folder's config.yaml is what evaluate and generate start from."""
    config = compose("model=switch_tiny", "train.micro_batch=4")
    assert validate(config.model_dump(mode="json"), TrainConfig, train_problems) == config


def test_the_schema_is_valid_as_it_stands() -> None:
    """Its defaults are a dense model: each default lies within its own bounds."""
    assert validate(defaults_of(TrainConfig) | {"run": {"dir": "x"}}, TrainConfig, train_problems)
