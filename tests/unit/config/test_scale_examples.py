"""The examples of docs/scale.md are configurations that their numbers of ranks can start with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig

TEXT = (Path(__file__).parents[3] / "docs/scale.md").read_text().replace("\\\n", " ")
EXAMPLES = re.findall(r"^(bash launch/local.sh 8|sbatch --nodes=\d+ launch/slurm.sbatch) (.*=.*)$", TEXT, re.MULTILINE)
STARTED = [(start, keys.split()) for start, keys in EXAMPLES if "KEY=VALUE" not in keys]


@pytest.mark.parametrize(("start", "keys"), STARTED, ids=[start for start, _ in STARTED])
def test_an_example_starts(start: str, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = re.search(r"--nodes=(\d+)", start)
    monkeypatch.setenv("WORLD_SIZE", str(8 * int(nodes[1]) if nodes else 8))
    compose_config("train", TrainConfig, train_problems, keys)


def test_there_are_three_examples() -> None:
    assert len(STARTED) == 3
