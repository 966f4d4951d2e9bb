"""docs/routing.md names every option of routing, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from moe_train.config.balance import BalanceConfig
from moe_train.config.compose import compose_config
from moe_train.config.groups import options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.config.validate import model_of

TEXT = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)[3:]
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python -m moe_train.train")
]


@pytest.mark.parametrize("group", ["router", "balance", "capacity"])
def test_each_table_has_a_line_for_every_option_and_no_other(group):
    (table,) = re.findall(rf"^\| `{group}=` \|.*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == options_of(f"model/ffn/{group}")


def test_every_line_of_a_table_has_as_many_cells_as_its_headings():
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_is_a_possible_run(arguments):
    assert compose_config("train", TrainConfig, train_problems, arguments)


def test_every_key_of_a_balance_method_exists():
    named = re.findall(r"`(\w+)\.(\w+)", TEXT)
    keys = [(section, key) for section, key in named if section in BalanceConfig.model_fields]
    assert len(keys) >= 6
    for section, key in keys:
        model = model_of(BalanceConfig.model_fields[section])
        assert model is not None and key in model.model_fields, f"{section}.{key}"
