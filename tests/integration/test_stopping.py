"""Asked to stop, a run saves the step it is at and ends soon, whoever is asked: the process itself or its launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch import SIGNALS, good_steps, records, started, stop_at, wait_for_step, wait_until

GRACE_S = 20.0
"""torchrun kills after 30 s, most cluster schedulers too."""


@pytest.fixture
def endless(tiny: list[str]) -> list[str]:
    return [*tiny, "train.steps=5000"]


def assert_saved(run_dir: Path, asked_at: int) -> None:
    last = records(run_dir, "train")[-1]["step"]
    assert asked_at <= last < 5000
    assert good_steps(run_dir) == [last]
    assert (run_dir / "report" / "index.html").is_file()


@pytest.mark.parametrize(("number", "status"), SIGNALS.items(), ids=lambda value: str(value))
def test_a_process_saves_and_tells_by_its_status_why_it_ended(
    number: int, status: int, endless: list[str], tmp_path: Path
) -> None:
    ended = stop_at(3, number, endless, tmp_path / "run")
    assert ended.status == status and ended.seconds < GRACE_S
    assert "Traceback" not in ended.stderr
    assert_saved(tmp_path / "run", 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_all_ranks_save_when_their_launcher_is_asked(number: int, endless: list[str], tmp_path: Path) -> None:
    ended = stop_at(3, number, [*endless, "parallel.ep=2"], tmp_path / "run", ranks=2)
    assert ended.status != 0 and ended.seconds < GRACE_S
    assert "run ended" not in ended.stderr, "no rank is lost"
    assert_saved(tmp_path / "run", 3)


@pytest.mark.slow
def test_one_rank_that_is_asked_takes_the_others_along(endless: list[str], tmp_path: Path) -> None:
    """It ended before the first rank had written the report, and torchrun terminated that one for it."""
    with started("train", [*endless, "run.dir=run", "parallel.ep=2"], tmp_path, ranks=2) as command:
        wait_for_step(command, tmp_path / "run", 3)
        os.kill(command.rank_pids()[1], signal.SIGTERM)
        assert command.wait(GRACE_S + 10.0).status != 0
        assert "run ended" not in command.output()
    assert_saved(tmp_path / "run", 3)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_leaves_the_last_checkpoint(endless: list[str], tmp_path: Path) -> None:
    """The second may find the run in its last save, or done with it: what is published is whole in each case."""
    run_dir = tmp_path / "run"
    with started("train", [*endless, "run.dir=run", "checkpoint.every=2"], tmp_path) as command:
        wait_for_step(command, run_dir, 5)
        command.signal(signal.SIGINT)
        command.signal(signal.SIGINT)
        ended = command.wait(GRACE_S)
    assert ended.status not in (0, 2)
    assert good_steps(run_dir) and all(step % 2 == 0 or step >= 5 for step in good_steps(run_dir))


@pytest.mark.slow
def test_ranks_whose_launcher_was_killed_save_and_stop(endless: list[str], tmp_path: Path) -> None:
    """They went on to their last step, seen by nobody, and a new start met them in the run folder."""
    run_dir = tmp_path / "run"
    with started("train", [*endless, "run.dir=run", "parallel.ep=2"], tmp_path, ranks=2) as command:
        wait_for_step(command, run_dir, 3)
        command.signal(signal.SIGKILL)
        wait_until(lambda: not command.alive(), GRACE_S, "the end of the ranks", poll_s=0.2)
        assert "the launcher is gone: stopping" in command.output()
    assert_saved(run_dir, 3)
