"""Mistakes in input and configuration: told at once, all together, without a traceback, with exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import AS_INHERITED, Ended, Variables, run

SOON_S = 20.0
"""Twice what is promised: the machine that tests may be busy with other tests."""


def refused(
    door: str, overrides: list[str], folder: Path, ranks: int = 1, variables: Variables = AS_INHERITED
) -> Ended:
    """Run a command that must refuse its input. torchrun answers 1 whatever its ranks answer."""
    ended = run(door, overrides, folder, ranks, variables, status=2 if ranks == 1 else 1)
    assert "problem" in ended.stderr, ended.stderr
    if ranks == 1:
        assert "Traceback" not in ended.stderr + ended.stdout
        assert ended.seconds < SOON_S
    return ended


def problems(ended: Ended) -> list[str]:
    """The lines of the report below its headline."""
    return [line.strip() for line in ended.stderr.splitlines() if line.startswith("  ")]


@pytest.fixture(scope="module")
def bad_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "not_text").mkdir()
    (folder / "not_text" / "latin.txt").write_bytes("Ein schöner Tag.\n".encode("latin-1") * 50)
    (folder / "not_text" / "noise.txt").write_bytes(bytes(range(128, 256)) * 10)
    (folder / "short").mkdir()
    (folder / "short" / "few.txt").write_text("\n\n".join(f"Paragraph number {i}." for i in range(8)))
    return folder


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", ["does not exist"]),
        ("empty", ["is an empty folder"]),
        ("not_text", ["latin.txt: byte 7 is not UTF-8", "noise.txt: byte 0 is not UTF-8"]),
        ("short", ["one global batch needs 257"]),
    ],
)
def test_bad_texts(path: str, told: list[str], tiny: list[str], bad_texts: Path, tmp_path: Path) -> None:
    ended = refused("train", [*tiny, f"data.path={bad_texts / path}", "run.dir=run"], tmp_path)
    assert len(problems(ended)) == len(told)
    for line, expected in zip(problems(ended), told, strict=True):
        assert expected in line
        assert path in line or path == "short", "the place is named, unless it is the text as a whole"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run_dir", ["taken", "taken/below"])
def test_a_file_in_the_place_of_the_run_folder(run_dir: str, tiny: list[str], tmp_path: Path) -> None:
    """Was a traceback of FileExistsError, after the corpus had been prepared."""
    (tmp_path / "taken").write_text("")
    ended = refused("train", [*tiny, f"run.dir={run_dir}"], tmp_path)
    assert problems(ended)[0].startswith(f"run.dir={run_dir}: ") and "is a file" in problems(ended)[0]


def test_mistakes_of_all_kinds_are_told_together(tmp_path: Path) -> None:
    overrides = ["model.dims=32", "train.steps=0", "parallel.ep=3", "data.source=text", "optim.warmup_steps=x"]
    told = problems(refused("train", overrides, tmp_path))
    keys = ["model.dims", "train.steps", "optim.warmup_steps", "data.path", "parallel.ep", "parallel.ep"]
    assert sorted(line.partition(":")[0].partition("=")[0] for line in told) == sorted(keys)
    assert any("did you mean model.dim?" in line for line in told)
    assert any("must divide the number of ranks, 1" in line for line in told)
    assert any("must divide model.ffn.num_experts=8" in line for line in told)
    assert not list(tmp_path.glob("*/")), "nothing is made"


@pytest.mark.parametrize("name", ["../../elsewhere", "x" * 300])
def test_a_run_name_cannot_leave_its_place(name: str, tmp_path: Path) -> None:
    assert problems(refused("train", [f"run.name={name}"], tmp_path))[0].startswith("run.name=")


@pytest.mark.parametrize(
    ("door", "overrides"), [("evaluate", []), ("generate", ["prompt=x"]), ("report", [])], ids=lambda value: str(value)
)
def test_a_run_that_does_not_exist(door: str, overrides: list[str], tmp_path: Path) -> None:
    assert problems(refused(door, [*overrides, "run.dir=nowhere"], tmp_path))[0].startswith("run.dir=nowhere: ")
    assert not (tmp_path / "nowhere").exists()


def test_generate_lists_all_that_is_missing(tmp_path: Path) -> None:
    told = problems(refused("generate", ["sample.top_p=2"], tmp_path))
    assert [line.partition(":")[0] for line in told] == ["run.dir", "prompt", "sample.top_p=2"]


SLOW_LEADER = """
import os, time
if os.environ.get("RANK") == "0":
    time.sleep(1.5)
"""


def test_under_torchrun_a_mistake_is_told_whichever_rank_is_first(tmp_path: Path) -> None:
    """torchrun ends all ranks with the first that ends: while only the first rank spoke, it could be too late."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_LEADER)
    slow_leader = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    ended = refused("train", ["parallel.ep=3"], tmp_path, ranks=2, variables=slow_leader)
    assert "configuration error: 2 problems" in ended.stderr


@pytest.mark.slow
def test_under_torchrun_a_bad_text_is_told_once(tiny: list[str], tmp_path: Path) -> None:
    ended = refused("train", [*tiny, "data.path=nowhere", "parallel.ep=2"], tmp_path, ranks=2)
    assert ended.stderr.count("data error: 1 problem") == 1
