"""What recomputation and compilation ask of a configuration and of the machine."""

from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.remat_rules import remat_problems
from moe_train.config.schema import TrainConfig


def keys_of(*overrides: str) -> list[str]:
    """The keys of the problems of a configuration."""
    config = compose_config("train", TrainConfig, lambda config: [], list(overrides))
    return [problem.key for problem in remat_problems(config, 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which commands are found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def add_command(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def test_without_a_compiler_only_compilation_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys_of() == []
    assert keys_of("train.compile=block") == ["train.compile"]
    monkeypatch.setenv("CXX", "my-compiler")
    assert keys_of("train.compile=block") == ["train.compile"]


def test_the_problem_names_the_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-compiler")
    config = compose_config("train", TrainConfig, lambda config: [], ["train.compile=block"])
    (problem,) = remat_problems(config, 1)
    assert "no my-compiler" in problem.rule
    assert "train.compile=none" in problem.remedy


@pytest.mark.parametrize("variable", [None, "clang++"])
def test_with_a_compiler_nothing_is_refused(
    variable: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    add_command(folder, variable or "g++")
    assert keys_of("train.compile=block") == []


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["sparse_tiny", "dense_tiny", "graph_tiny", "graph_block_tiny"])
def test_each_way_to_recompute_goes_with_each_model(model: str, remat: str) -> None:
    assert keys_of(f"model={model}", f"parallel.remat={remat}") == []


def test_graphs_of_blocks_have_nothing_to_compile(folder: Path) -> None:
    add_command(folder, "g++")
    assert keys_of("model=graph_block_tiny", "train.compile=block") == ["train.compile"]
    assert keys_of("model=graph_tiny", "train.compile=block") == []
