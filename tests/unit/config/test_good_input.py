"""What must work: presets, groups and single keys in any combination, and what they mean."""

import pytest
from pydantic import ValidationError

from moe_train.config.balance import AuxLossConfig, BalanceConfig, LossFreeConfig, ZLossConfig
from moe_train.config.compose import compose_config, defaults_of
from moe_train.config.routing import (
    DeviceCapacityConfig,
    DroplessConfig,
    FactorCapacityConfig,
    GShardRouterConfig,
    HashRouterConfig,
    NoisyTopKRouterConfig,
    SigmoidRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
)
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
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


def test_a_kind_starts_from_its_own_defaults_however_it_is_chosen() -> None:
    """The preset's router has jitter 0, that of Switch 0.01: what one kind leaves unsaid is not a value of another."""
    by_key = compose("model.ffn.top_k=1", "model.ffn.router.kind=switch")
    by_option = compose("model.ffn.top_k=1", "model/ffn/router=switch")
    assert by_key.model.ffn.router == by_option.model.ffn.router == SwitchRouterConfig(scale=2.0)
    assert compose("model=switch_tiny", "model/ffn/capacity=device").model.ffn.capacity == DeviceCapacityConfig()


def test_what_the_preset_says_for_all_kinds_stays() -> None:
    """scale is a field of every router: two experts still add up."""
    assert compose("model/ffn/router=sigmoid").model.ffn.router == SigmoidRouterConfig(scale=2.0)
    config = compose("model/ffn/router=hash", "model/ffn/balance=none")
    assert config.model.ffn.router == HashRouterConfig(scale=2.0)


def test_a_nested_group_replaces_that_of_the_preset() -> None:
    config = compose("model=switch_tiny", "model/ffn/capacity=dropless", "model/ffn/balance=sequence")
    assert config.model.ffn.capacity == DroplessConfig()
    assert config.model.ffn.balance == BalanceConfig(aux=AuxLossConfig(scope="sequence"))
    assert config.model.ffn.top_k == 1, "the rest of the preset stays"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", BalanceConfig()),
        ("none", BalanceConfig()),
        ("z_loss", BalanceConfig(z_loss=ZLossConfig())),
        ("[z_loss]", BalanceConfig(z_loss=ZLossConfig())),
        ("[aux,z_loss]", BalanceConfig(aux=AuxLossConfig(), z_loss=ZLossConfig())),
        ("[z_loss,micro]", BalanceConfig(aux=AuxLossConfig(scope="micro"), z_loss=ZLossConfig())),
        ("[loss_free,sequence]", BalanceConfig(aux=AuxLossConfig(scope="sequence"), loss_free=LossFreeConfig())),
    ],
)
@pytest.mark.parametrize("preset", ["sparse_tiny", "switch_tiny"])
def test_any_list_of_balance_methods(preset: str, value: str, expected: BalanceConfig) -> None:
    assert compose(f"model={preset}", f"model/ffn/balance={value}").model.ffn.balance == expected


def test_a_list_of_balance_methods_with_a_field() -> None:
    config = compose("model/ffn/balance=[aux,z_loss]", "model.ffn.balance.z_loss.coef=0.5")
    assert config.model.ffn.balance == BalanceConfig(aux=AuxLossConfig(), z_loss=ZLossConfig(coef=0.5))


def test_a_field_switches_its_balance_method_on() -> None:
    config = compose("model/ffn/balance=none", "model.ffn.balance.aux.coef=0.5")
    assert config.model.ffn.balance == BalanceConfig(aux=AuxLossConfig(coef=0.5))


def test_all_balance_methods_together() -> None:
    config = compose(
        "model/ffn/router=noisy_topk", "model/ffn/balance=[aux,importance_load,z_loss,device,communication]"
    )
    on = [name for name in BalanceConfig.model_fields if getattr(config.model.ffn.balance, name) is not None]
    assert on == ["aux", "importance_load", "z_loss", "device", "communication"]
    assert isinstance(config.model.ffn.router, NoisyTopKRouterConfig)


def test_a_dense_preset_may_be_given_routing() -> None:
    config = compose("model=dense_tiny", "model.ffn.num_experts=4", "+model/ffn/balance=[aux]")
    assert config.model.ffn.balance == BalanceConfig(aux=AuxLossConfig())


def test_presets_route_as_their_papers_do() -> None:
    both = BalanceConfig(aux=AuxLossConfig(), z_loss=ZLossConfig())
    routing = {name: compose(f"model={name}").model.ffn for name in ("sparse_tiny", "switch_tiny", "glam_tiny")}
    assert [ffn.balance for ffn in routing.values()] == [both] * 3
    assert routing["sparse_tiny"].router == TopKRouterConfig(scale=2.0)
    assert routing["switch_tiny"].router == SwitchRouterConfig()
    assert routing["glam_tiny"].router == GShardRouterConfig()
    assert routing["switch_tiny"].capacity == FactorCapacityConfig(factor=1.25)


def test_a_loss_is_switched_off_with_null() -> None:
    assert compose("model.ffn.balance.z_loss=null").model.ffn.balance == BalanceConfig(aux=AuxLossConfig())


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
