"""The study of scaling, tiny: a sweep, started again, interrupted, and the report on it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import TINY, Ended, records, run, started, wait_for_step

pytestmark = pytest.mark.slow
STEPS = 6
VARIANTS = ("scale_s_dense", "scale_s_e4_g2")
OWN = ("data.seq_len", "eval.every", "checkpoint.every", "model.")
"""Settings that the variants or the experiment have, and a sweep must not be told."""


@pytest.fixture(scope="module")
def tiny_sweep(data: list[str]) -> list[str]:
    """The experiment with two variants of a few short steps."""
    small = [setting for setting in TINY if not setting.startswith(OWN)]
    sweep = f'hydra.sweeper.params={{study:"{",".join(VARIANTS)}",train.steps:"{STEPS}"}}'
    return ["experiment=scaling_laws", *data, *small, "data.seq_len=32", sweep]


def folder_of(folder: Path, variant: str) -> Path:
    """The run folder of a variant."""
    (found,) = folder.glob(f"runs/scaling_laws/scale-study_{variant}-*")
    return found


@dataclass(frozen=True)
class Swept:
    """A sweep that was started twice."""

    folder: Path
    lines: dict[str, str]
    second: Ended


@pytest.fixture(scope="module")
def swept(tiny_sweep: list[str], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("scaling")
    run("train", tiny_sweep, folder)
    lines = {variant: (folder_of(folder, variant) / "metrics.jsonl").read_text() for variant in VARIANTS}
    return Swept(folder, lines, run("train", tiny_sweep, folder))


def test_a_second_start_neither_trains_nor_evaluates(swept: Swept) -> None:
    for variant in VARIANTS:
        path = folder_of(swept.folder, variant)
        assert (path / "metrics.jsonl").read_text() == swept.lines[variant]
        assert len(records(path, "train")) == STEPS and len(records(path, "eval")) == 1
    assert swept.second.stdout.count("finished before: ") == len(swept.second.stdout.splitlines()) == len(VARIANTS)


def test_a_study_that_is_too_small_is_refused_with_what_is_missing(swept: Swept) -> None:
    ended = run("report", ["study=runs/scaling_laws"], swept.folder, status=2)
    assert "sizes of the model" in ended.stderr and "numbers of tokens" in ended.stderr
    assert "Traceback" not in ended.stderr and "finished runs" in ended.stderr


def test_an_interrupted_sweep_goes_on_where_it_stopped(tiny_sweep: list[str], tmp_path: Path) -> None:
    longer = [*tiny_sweep[:-1], tiny_sweep[-1].replace(f'"{STEPS}"', '"60"')]
    with started("train", longer, tmp_path) as command:
        first = tmp_path / f"runs/scaling_laws/scale-study_{VARIANTS[0]}-train.steps_60-seed_0"
        wait_for_step(command, first, 10)
        command.signal(signal.SIGTERM)
        assert command.wait(60.0).status == 143
    stopped = records(first, "train")[-1]["step"]
    assert stopped < 60 and not records(first, "eval") and len(list(first.parent.iterdir())) == 1
    ended = run("train", longer, tmp_path)
    assert "finished before" not in ended.stdout
    resumed = [event for event in records(first, "event") if event["event"] == "resumed"]
    assert len(resumed) == 1 and 10 <= resumed[0]["step"] < 60
    for variant in VARIANTS:
        assert [record["step"] for record in records(folder_of(tmp_path, variant), "eval")] == [60]


def test_a_point_that_was_finished_with_other_settings_is_refused(tiny_sweep: list[str], swept: Swept) -> None:
    path = folder_of(swept.folder, VARIANTS[0])
    by_hand = ["hydra.mode=RUN", f"study={VARIANTS[0]}", f"run.name={path.name}", f"train.steps={STEPS}"]
    ended = run("train", [*tiny_sweep[:-1], *by_hand, "optim.lr=0.5"], swept.folder, status=2)
    assert "optim.lr=0.5: the finished run in" in ended.stderr and "has 0.004" in ended.stderr
