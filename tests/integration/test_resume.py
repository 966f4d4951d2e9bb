"""A run that was stopped goes on as if it had not been: to the last bit in one layout, closely in another."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import Ended, assert_same_tensors, checkpoint_path, curve, good_steps, records, run, stop_at

STEPS = 40
WITH_MEMORY = [
    "model/ffn/balance=[aux,z_loss,loss_free]", "model.ffn.router.jitter=0.05", "model.ffn.router.expert_dropout=0.1",
    "model/ffn/capacity=random",
]  # fmt: skip
"""Biases that steps move, and draws: both must go on where they were."""
ASKED_AT = (1, 8, 16)
"""Steps after which the run is asked to stop; it does one or two more."""


@dataclass(frozen=True)
class Twins:
    """One training in one life, and the same in four.

    Attributes:
        whole: folder of the run that was never stopped.
        stopped: folder of the run that was stopped three times.
        stops: how its lives ended.
        settings: of both.
    """

    whole: Path
    stopped: Path
    stops: list[Ended]
    settings: list[str]


@pytest.fixture(scope="module")
def twins(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp("resume")
    settings = [*tiny, f"train.steps={STEPS}", "checkpoint.every=15", "checkpoint.keep=9", *WITH_MEMORY]
    run("train", [*settings, "run.dir=whole"], folder)
    stops = [stop_at(step, signal.SIGTERM, settings, folder / "stopped") for step in ASKED_AT]
    run("train", [*settings, "run.dir=stopped"], folder)
    return Twins(folder / "whole", folder / "stopped", stops, settings)


def starts(run_dir: Path) -> list[int]:
    """The steps at which the lives of a run began."""
    return [row["step"] for row in records(run_dir, "event") if row["event"] in ("started", "resumed")]


def test_each_life_went_on_where_the_last_one_was_stopped(twins: Twins) -> None:
    assert [ended.status for ended in twins.stops] == [143] * 3
    first, *resumed = starts(twins.stopped)
    assert first == 0 and len(resumed) == 3
    for asked, step in zip(ASKED_AT, resumed, strict=True):
        assert asked <= step < STEPS, "stopped soon after it was asked to, long before the end"


def test_three_stops_leave_no_trace_in_the_curve(twins: Twins) -> None:
    assert len(curve(twins.whole)) == STEPS
    assert curve(twins.stopped) == curve(twins.whole)
    assert records(twins.stopped, "eval") == records(twins.whole, "eval")


def test_trap_35_three_stops_leave_no_trace_in_weights_and_moments(twins: Twins) -> None:
    assert_same_tensors(checkpoint_path(twins.stopped, STEPS), checkpoint_path(twins.whole, STEPS))


@pytest.mark.slow
def test_a_run_that_died_after_its_last_save_is_evaluated_by_the_next_start(twins: Twins, tmp_path: Path) -> None:
    """The final evaluation stood only on the console: the records, and with them the report, had none."""
    shutil.copytree(twins.whole, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"eval"' not in line))
    run("train", [*twins.settings, "run.dir=run"], tmp_path)
    assert records(tmp_path / "run", "eval") == records(twins.whole, "eval")
    assert curve(tmp_path / "run") == curve(twins.whole)


@pytest.mark.slow
def test_another_layout_goes_on_from_a_checkpoint(twins: Twins, tmp_path: Path) -> None:
    """One rank's checkpoint on two ranks that share the experts, and their checkpoint on one rank again."""
    middle = f"checkpoint.resume={checkpoint_path(twins.whole, 15)}"
    run("train", [*twins.settings, middle, "run.dir=two", "parallel.ep=2"], tmp_path, ranks=2)
    back = f"checkpoint.resume={checkpoint_path(tmp_path / 'two', 30)}"
    run("train", [*twins.settings, back, "run.dir=one"], tmp_path)
    truth = {row["step"]: row for row in records(twins.whole, "train")}
    for run_dir, first in ((tmp_path / "two", 16), (tmp_path / "one", 31)):
        rows = records(run_dir, "train")
        assert [row["step"] for row in rows] == list(range(first, STEPS + 1))
        for row in rows:
            assert row["loss"] == pytest.approx(truth[row["step"]]["loss"], rel=1e-5), row["step"]
            assert row["tokens"] == truth[row["step"]]["tokens"]


def test_more_steps_go_on_and_never_starts_anew(twins: Twins, tmp_path: Path) -> None:
    shutil.copytree(twins.whole, tmp_path / "run")
    settings = [*twins.settings, "run.dir=run"]
    run("train", [*settings, f"train.steps={STEPS + 3}"], tmp_path)
    assert starts(tmp_path / "run") == [0, STEPS]
    assert [row[0] for row in curve(tmp_path / "run")] == list(range(1, STEPS + 4))
    assert curve(tmp_path / "run")[:STEPS] == curve(twins.whole)
    assert good_steps(tmp_path / "run")[-2:] == [STEPS, STEPS + 3]

    run("train", [*settings, "train.steps=3", "checkpoint.resume=never"], tmp_path)
    assert [row[0] for row in curve(tmp_path / "run")] == [1, 2, 3]
    assert curve(tmp_path / "run")[0][1] == curve(twins.whole)[0][1]
    assert good_steps(tmp_path / "run") == [3], "the other history is set aside, not resumed from by mistake"


def test_another_run_in_the_same_folder_is_refused_with_every_difference(twins: Twins) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in twins.whole.rglob("*"))
    changes = ["run.seed=1", "data.seq_len=16", "model.dim=64", "model.ffn.top_k=1"]
    changes += ["model.ffn.router.normalize=none", "train.global_batch=4"]
    ended = run("train", [*twins.settings, *changes, "run.dir=whole"], twins.whole.parent, status=2)
    told = [line.strip() for line in ended.stderr.splitlines() if line.startswith("  ")]
    for key, old, new in [
        ("run.seed", 0, 1),
        ("data.seq_len", 32, 16),
        ("model.dim", 32, 64),
        ("model.ffn.top_k", 2, 1),
        ("model.ffn.router.normalize", "selected", "none"),
        ("train.global_batch", 8, 4),
    ]:
        assert any(line.startswith(f"{key}: ") and f"{old} -> {new}" in line for line in told), f"{key}\n{told}"
    assert len(told) == len(changes) and "Traceback" not in ended.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in twins.whole.rglob("*")) == before, "nothing is touched"
