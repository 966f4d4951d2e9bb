"""The commands with experts on disk: the same text and figures, a line about what was read, mistakes of the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import run


@pytest.fixture(scope="module")
def run_dir(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload") / "run"
    settings = ["model.ffn.num_experts=4", "model.ffn.expert_dim=32", "train.steps=3", f"run.dir={folder}"]
    run("train", [*tiny, *settings], folder.parent)
    return folder


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_both_doors_say_the_same_and_what_they_read(run_dir: Path, ranks: int) -> None:
    layout = [f"run.dir={run_dir}", f"parallel.ep={ranks}"]
    for door, keys in (("generate", ["prompt=The", "sample.max_tokens=5"]), ("evaluate", ["eval.batches=1"])):
        truth = run(door, [*layout, *keys], run_dir.parent, ranks)
        found = run(door, [*layout, *keys, "inference.offload.cached=1"], run_dir.parent, ranks)
        assert found.stdout == truth.stdout
        assert "experts on disk" not in truth.stderr
        assert found.stderr.count("experts on disk: ") == 1 and " misses (hit rate 0." in found.stderr
        assert door == "generate" or json.loads(found.stdout)["loss"] > 0


def test_a_folder_of_others_is_a_mistake_of_the_user(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    keys = [f"run.dir={run_dir}", "prompt=The", f"inference.offload.folder={tmp_path}"]
    ended = run("generate", keys, run_dir.parent, status=2)
    assert "inference.offload.folder" in ended.stderr and "Traceback" not in ended.stderr
