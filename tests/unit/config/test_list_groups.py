"""A list of balance losses on the command line is the whole list."""

from __future__ import annotations

import subprocess
import sys

import yaml

from moe_train.config.balance import BalanceConfig
from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig


def balance(*overrides: str) -> BalanceConfig:
    return compose_config("train", TrainConfig, lambda config: [], list(overrides)).model.ffn.balance


def switched_on(*overrides: str) -> set[str]:
    return {name for name, section in balance(*overrides) if section is not None}


def test_a_presets_losses_are_its_own() -> None:
    found = balance("model=deepseek_v3_tiny")
    assert found.aux is not None and found.aux.coef == 1e-4
    assert switched_on("model=deepseek_v3_tiny") == {"aux", "loss_free"}


def test_the_strength_of_a_loss_that_was_not_chosen_does_not_stay_behind() -> None:
    """The preset's balance.aux.coef used to switch the loss on again."""
    assert switched_on("model=deepseek_v3_tiny", "model/ffn/balance=[loss_free]") == {"loss_free"}
    assert switched_on("model=deepseek_v3_tiny", "model/ffn/balance=none") == set()
    assert switched_on("model=deepseek_v3_tiny", "model/ffn/balance=z_loss") == {"z_loss"}


def test_a_chosen_loss_keeps_the_presets_strength() -> None:
    found = balance("model=deepseek_v3_tiny", "model/ffn/balance=[sequence,z_loss]")
    assert found.aux is not None and (found.aux.coef, found.aux.scope) == (1e-4, "sequence")


def test_a_key_on_the_command_line_switches_its_loss_on() -> None:
    overrides = ["model=deepseek_v3_tiny", "model/ffn/balance=[loss_free]", "model.ffn.balance.aux.coef=0.5"]
    found = balance(*overrides)
    assert found.aux is not None and found.aux.coef == 0.5


def test_the_shown_configuration_is_the_one_that_runs() -> None:
    words = ["model=deepseek_v3_tiny", "model/ffn/balance=[loss_free]", "--cfg", "job"]
    shown = subprocess.run(
        [sys.executable, "-m", "moe_train.train", *words], capture_output=True, text=True, check=True
    ).stdout
    found = yaml.safe_load(shown)["model"]["ffn"]["balance"]
    assert found["aux"] is None and found["loss_free"]["rate"] > 0
