"""The table of what remembering a text gains: both ways in full, what a token takes, whether the text is the same."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig

SCRIPT = Path(__file__).parents[3] / "scripts/generation_speed.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generation_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def setting(script):
    return script.Setting(prompt=4, precision="fp32", device=torch.device("cpu"), rounds=1)


@pytest.fixture
def small(monkeypatch):
    """Presets that are 32 wide, of two layers."""

    def composed(door, schema, rules, overrides):
        narrow = ["model.dim=32", "model.layers=2", "model.ffn.hidden_dim=32"]
        if "graph" in overrides[0]:
            narrow = [key for key in narrow if "hidden" not in key] + ["model.heads=4"]
        return compose_config("train", TrainConfig, lambda config: [], [*overrides, *narrow])

    return lambda script: monkeypatch.setattr(script, "compose_config", composed)


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in "\n".join(lines).splitlines()]


def test_both_ways_have_a_line(script, setting, small):
    small(script)
    table = cells(script.rows(["dense_tiny", "graph_block_tiny"], [8], setting))
    assert len({len(row) for row in table}) == 1
    assert [row[:3] for row in table[2:]] == [
        [name, "8", way] for name in ("dense_tiny", "graph_block_tiny") for way in ("read again", "remembered")
    ]
    assert all(float(row[3]) > 0 and row[6] == "yes" for row in table[2:])
    # Two layers of four key heads of width 4, fp32; experts that are blocks remember nothing.
    assert [row[5] for row in table[2:]] == ["0", str(2 * 2 * 4 * 4 * 4), "0", "0"]


def test_each_way_reads_what_it_says(script, setting, small):
    small(script)
    model, read = script.model_of("dense_tiny", setting), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    texts = [script.text_of(model, 8, setting, remember) for remember in (False, True)]
    assert read == [4, 5, 6, 7, 4, 1, 1, 1]
    assert texts[0] == texts[1] and len(texts[0]) == 4
