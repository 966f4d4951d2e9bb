"""A rank that dies or hangs ends the run soon, and those who live say which it was."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from launch import Command, curve, run, started, wait_for_step, wait_until

SOON_S = 30.0


def named(command: Command) -> list[str]:
    """The roll-call lines of the survivors."""
    return [line for line in command.err.read_text().splitlines() if "run ended: " in line]


def assert_named(command: Command, victim: int, pid: int, survivors: list[int]) -> None:
    lines = named(command)
    speakers = sorted(int(rank) for line in lines for rank in re.findall(r"\[rank (\d+)\] run ended: ", line))
    assert speakers == survivors, command.output()
    for line in lines:
        assert f"lost rank {victim} (host " in line and f"pid {pid})" in line, line


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_a_killed_rank_is_named(ranks: int, victim: int, tiny: list[str], tmp_path: Path) -> None:
    """torchrun terminates the survivors a tenth of a second later: it cut off their roll call."""
    overrides = [*tiny, "run.dir=run", "train.steps=5000", "parallel.ep=2"]
    with started("train", overrides, tmp_path, ranks) as command:
        wait_for_step(command, tmp_path / "run", 3)
        pid = command.rank_pids()[victim]
        os.kill(pid, signal.SIGKILL)
        assert command.wait(SOON_S).status != 0
        assert_named(command, victim, pid, [rank for rank in range(ranks) if rank != victim])
        assert not command.alive()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "run.dir=run", "train.steps=5000", "parallel.ep=2", "parallel.timeout_s=8"]
    with started("train", overrides, tmp_path, ranks=2) as command:
        wait_for_step(command, tmp_path / "run", 3)
        pids = command.rank_pids()
        os.kill(pids[1], signal.SIGSTOP)
        wait_until(lambda: not is_alive(command, pids[0]), SOON_S, "the end of rank 0", poll_s=0.2)
        assert_named(command, 1, pids[1], [0])
        # torchrun now waits 30 s for the stopped rank before it kills it: that is torchrun's own matter.
        os.kill(pids[1], signal.SIGKILL)
        assert command.wait(SOON_S).status != 0
        assert not command.alive()


@pytest.mark.slow
def test_a_run_that_lost_a_rank_goes_on_from_its_last_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    settings = [*tiny, "train.steps=120", "parallel.ep=2", "checkpoint.every=10"]
    run("train", [*settings, "run.dir=twin"], tmp_path, ranks=2)
    with started("train", [*settings, "run.dir=run"], tmp_path, ranks=2) as command:
        wait_for_step(command, tmp_path / "run", 12)
        os.kill(command.rank_pids()[0], signal.SIGKILL)
        command.wait(SOON_S)
    run("train", [*settings, "run.dir=run"], tmp_path, ranks=2)
    assert curve(tmp_path / "run") == curve(tmp_path / "twin")


def is_alive(command: Command, pid: int) -> bool:
    return pid in [process.pid for process in command.alive()]
