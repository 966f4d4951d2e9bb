"""docs/interop.md: its commands are commands, and it names every key of the export and every class."""

import re
import shlex
from pathlib import Path

import pytest
from made_up_model import folder_of

from moe_train.config.compose import compose_config
from moe_train.config.groups import options_of
from moe_train.config.schema import ExportConfig, TrainConfig
from moe_train.interop.families import FAMILIES
from moe_train.interop.families.llama import Llama

TEXT = (Path(__file__).parents[3] / "docs" / "interop.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def arguments_of(door: str) -> list[list[str]]:
    return [words[words.index(door) + 1 :] for words in COMMANDS if door in words]


@pytest.mark.parametrize("arguments", arguments_of("moe_train.export"), ids=" ".join)
def test_every_export_is_a_possible_one(arguments):
    assert compose_config("export", ExportConfig, lambda config: [], arguments).to == "exported"


@pytest.mark.parametrize("arguments", arguments_of("moe_train.train"), ids=" ".join)
def test_every_training_has_keys_that_exist(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = TrainConfig().model
    folder_of(tmp_path / "exported", {}, config=Llama().public_config(model, 300) | {"max_position_embeddings": 256})
    config = compose_config("train", TrainConfig, lambda config: [], arguments)
    assert (config.model.init_from, config.model.adopt) in (("exported", True), ("dense", False))
    assert "pretrained" in options_of("model")


def test_every_key_and_every_class_is_named():
    assert len(arguments_of("moe_train.export")) >= 2 and len(arguments_of("moe_train.train")) >= 1
    named = set(re.findall(r"^\| `([\w.]+)` \|", TEXT, re.MULTILINE))
    keys = set(ExportConfig.model_fields) - {"run", "to", "parallel"} | {"parallel.ep"}
    assert named == keys
    assert all(f"`{family.class_name}`" in TEXT for family in FAMILIES.values())


def test_tables_have_as_many_cells_as_headings():
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
