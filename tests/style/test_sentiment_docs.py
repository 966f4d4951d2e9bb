"""docs/sentiment.md: its commands are possible runs, and it names every figure of a classifier."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import EvaluateConfig, TrainConfig
from moe_train.observe.classes import OF_CLASSES, Verdicts
from moe_train.observe.report.figures import OF_CLASS_EXPERTS
from moe_train.observe.report.figures import OF_CLASSES as FIGURES

TEXT = (Path(__file__).parents[2] / "docs" / "sentiment.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def words_of(door: str) -> list[list[str]]:
    """The settings of each command of a door."""
    name = f"moe_train.{door}"
    return [words[words.index(name) + 1 :] for words in COMMANDS if name in words]


def test_there_are_commands() -> None:
    assert len(words_of("train")) >= 8 and len(words_of("evaluate")) >= 2
    assert len(COMMANDS) == len(words_of("train")) + len(words_of("evaluate"))


@pytest.mark.parametrize("arguments", words_of("train"), ids=" ".join)
def test_every_training_is_a_possible_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "parallel.ep=2" in arguments:
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "experiment=sentiment_study" in arguments:
        arguments = [*arguments, "study=sentiment_vader"]  # the sweep's own choice
    assert compose_config("train", TrainConfig, train_problems, arguments)


@pytest.mark.parametrize("arguments", words_of("evaluate"), ids=" ".join)
def test_every_evaluation_is_possible(arguments: list[str]) -> None:
    assert compose_config("evaluate", EvaluateConfig, lambda config: [], arguments)


def test_every_figure_is_defined() -> None:
    keys = {field.name for field in fields(Verdicts)} | set(OF_CLASSES) | {"loss", "confusion"}
    assert keys <= set(re.findall(r"`(\w+)`", TEXT))
    assert all(module.TITLE in TEXT for module in (*FIGURES, *OF_CLASS_EXPERTS))


def test_every_line_of_a_table_has_as_many_cells_as_its_headings() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
