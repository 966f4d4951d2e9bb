"""Killed in the middle of saves: a whole checkpoint always exists, and the end is that of the run nobody killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from launch import (
    Command,
    assert_same_tensors,
    checkpoint_path,
    curve,
    good_steps,
    records,
    run,
    started,
    wait_until,
)
from moe_train.checkpoint.faults import FAULT_POINTS, FAULT_VARIABLE
from moe_train.checkpoint.reader import CHECKPOINTS, published_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, KILLS = 60, 12


@pytest.fixture(scope="module")
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, f"train.steps={STEPS}", "parallel.ep=2", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def twin(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("twin")
    run("train", [*settings, "run.dir=twin"], folder, ranks=2)
    return folder / "twin"


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / CHECKPOINTS).glob(".step_*.saving"))


def kill_in_a_save(command: Command, run_dir: Path, delay_s: float) -> None:
    """SIGKILL launcher and ranks a moment after this life has begun its second save or a later one."""
    known = max(published_steps(run_dir / CHECKPOINTS), default=0)

    def has_published() -> bool:
        assert command.process.poll() is None, command.output()
        return max(published_steps(run_dir / CHECKPOINTS), default=0) > known

    wait_until(has_published, 90.0, "the first save of this life")
    wait_until(lambda: is_saving(run_dir), 30.0, "another save", poll_s=0.0005)
    time.sleep(delay_s)
    command.kill_all()


def test_random_kills_in_saves_leave_no_trace(settings: list[str], twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    draw = random.Random(0)
    cut_short = 0
    for _ in range(KILLS):
        before = good_steps(run_dir)
        with started("train", [*settings, "run.dir=run"], tmp_path, ranks=2) as command:
            kill_in_a_save(command, run_dir, delay_s=draw.uniform(0.0, 0.03))
        after = good_steps(run_dir)
        assert after == published_steps(run_dir / CHECKPOINTS), "what is published is whole"
        assert max(after) > max(before, default=0), "each life has brought the run on"
        cut_short += is_saving(run_dir)
    assert cut_short >= KILLS // 3, f"only {cut_short} of {KILLS} kills hit a save: the test has lost its aim"
    run("train", [*settings, "run.dir=run"], tmp_path, ranks=2)
    assert not is_saving(run_dir), "what the killed left behind is removed"
    assert len([row for row in records(run_dir, "event") if row["event"] == "resumed"]) == KILLS
    assert curve(run_dir) == curve(twin)
    assert records(run_dir, "eval") == records(twin, "eval")
    assert_same_tensors(checkpoint_path(run_dir, STEPS), checkpoint_path(twin, STEPS))


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_each_point_of_a_save_leaves_no_trace(
    point: str, settings: list[str], twin: Path, tmp_path: Path
) -> None:
    """The first save meets the point, but for those of pruning: there the second or the third does."""
    run_dir = tmp_path / "run"
    keep_one = [*settings, "run.dir=run", "checkpoint.keep=1"]
    ended = run("train", keep_one, tmp_path, ranks=2, variables={FAULT_VARIABLE: f"{point}:kill"}, status=None)
    assert ended.status != 0, "the fault was met"
    published = published_steps(run_dir / CHECKPOINTS)
    assert good_steps(run_dir) == published
    assert bool(published) == point.endswith("prune"), "published before pruning, not before the rename"
    run("train", keep_one, tmp_path, ranks=2)
    assert curve(run_dir) == curve(twin)
    assert good_steps(run_dir) == [STEPS]
    assert_same_tensors(checkpoint_path(run_dir, STEPS), checkpoint_path(twin, STEPS))
