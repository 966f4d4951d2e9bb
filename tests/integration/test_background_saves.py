"""Saves beside the training: the same checkpoints, the same promises when killed, failing, or asked to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch import (
    assert_same_tensors,
    checkpoint_path,
    curve,
    good_steps,
    records,
    run,
    started,
    stop_at,
    wait_for_step,
)
from moe_train.checkpoint.faults import FAULT_POINTS, FAULT_VARIABLE
from moe_train.checkpoint.reader import CHECKPOINTS, published_steps

STEPS = 8


@pytest.fixture(scope="module")
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, f"train.steps={STEPS}", "parallel.ep=2", "checkpoint.every=1", "checkpoint.keep=3"]


@pytest.fixture(scope="module")
def beside(settings: list[str]) -> list[str]:
    return [*settings, "run.dir=run", "checkpoint.async=true"]


@pytest.fixture(scope="module")
def twin(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that waits for its saves, and that nobody kills."""
    folder = tmp_path_factory.mktemp("twin")
    run("train", [*settings, "run.dir=twin"], folder, ranks=2)
    return folder / "twin"


def steps_of(run_dir: Path, event: str) -> list[int]:
    return [row["step"] for row in records(run_dir, "event") if row["event"] == event]


def test_checkpoints_are_those_of_a_run_that_waits(beside: list[str], twin: Path, tmp_path: Path) -> None:
    """Each is of its step, although the weights have changed since: three are compared."""
    run("train", beside, tmp_path, ranks=2)
    run_dir = tmp_path / "run"
    assert curve(run_dir) == curve(twin)
    assert good_steps(run_dir) == good_steps(twin) == [STEPS - 2, STEPS - 1, STEPS]
    for step in good_steps(run_dir):
        assert_same_tensors(checkpoint_path(run_dir, step), checkpoint_path(twin, step))
    assert steps_of(run_dir, "saving") == steps_of(run_dir, "saved") == list(range(1, STEPS + 1))
    saved = [row for row in records(run_dir, "event") if row["event"] == "saved"]
    assert all(0.0 < row["stall_ms"] < row["total_ms"] for row in saved)


def test_a_failed_save_is_an_event_and_the_run_goes_on(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "run.dir=run", "train.steps=5", "checkpoint.every=2", "checkpoint.async=true"]
    ended = run("train", words, tmp_path, variables={FAULT_VARIABLE: "ckpt.before_rename:raise"}, status=2)
    run_dir = tmp_path / "run"
    assert steps_of(run_dir, "save failed") == [2, 4]
    assert [row["step"] for row in records(run_dir, "train")] == list(range(1, 6))
    assert "checkpoint error" in ended.stderr and "Traceback" not in ended.stderr
    assert good_steps(run_dir) == []
    run("train", words, tmp_path)
    assert good_steps(run_dir)[-1] == 5


def test_a_run_that_is_asked_to_stop_saves_its_last_step(beside: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = stop_at(3, signal.SIGTERM, [*beside[:-2], beside[-1], "train.steps=5000", "parallel.ep=1"], run_dir)
    assert ended.status == 143 and "Traceback" not in ended.stderr
    assert good_steps(run_dir)[-1] == records(run_dir, "train")[-1]["step"]


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_in_the_middle_of_a_save(beside: list[str], tmp_path: Path) -> None:
    """Nobody waits for what a thread would wait for, and the checkpoints are whole."""
    run_dir = tmp_path / "run"
    with started("train", [*beside, "train.steps=5000"], tmp_path, ranks=2) as command:
        wait_for_step(command, run_dir, 4)
        os.kill(command.rank_pids()[1], signal.SIGKILL)
        ended = command.wait(40.0)
        assert not command.alive()
    assert ended.status not in (0, 2)
    assert "lost rank 1" in ended.stderr
    assert good_steps(run_dir) == published_steps(run_dir / CHECKPOINTS) != []


@pytest.mark.slow
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_each_point_of_a_save_leaves_no_trace(
    point: str, beside: list[str], twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    keep_one = [*beside, "checkpoint.keep=1"]
    ended = run("train", keep_one, tmp_path, ranks=2, variables={FAULT_VARIABLE: f"{point}:kill"}, status=None)
    assert ended.status != 0, "the fault was met"
    published = published_steps(run_dir / CHECKPOINTS)
    assert good_steps(run_dir) == published
    assert bool(published) == point.endswith("prune"), "published before pruning, not before the rename"
    run("train", keep_one, tmp_path, ranks=2)
    assert good_steps(run_dir) == [STEPS]
    assert [row for row in curve(run_dir) if row[0] > max(published, default=0)] == curve(twin)[
        max(published, default=0) :
    ]
    assert_same_tensors(checkpoint_path(run_dir, STEPS), checkpoint_path(twin, STEPS))
