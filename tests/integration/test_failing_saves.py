"""A disk that takes no checkpoint costs the checkpoint, not the run; only the last save must succeed."""

from __future__ import annotations

from pathlib import Path

from launch import good_steps, records, run
from moe_train.checkpoint.faults import FAULT_VARIABLE

STEPS = 5


def test_a_failed_save_is_an_event_and_the_run_goes_on(tiny: list[str], tmp_path: Path) -> None:
    settings = [*tiny, "run.dir=run", f"train.steps={STEPS}", "checkpoint.every=2"]
    ended = run("train", settings, tmp_path, variables={FAULT_VARIABLE: "ckpt.before_rename:raise"}, status=2)
    events = records(tmp_path / "run", "event")
    assert [row["step"] for row in events if row["event"] == "save failed"] == [2, 4]
    assert [row["step"] for row in records(tmp_path / "run", "train")] == list(range(1, STEPS + 1))
    assert "checkpoint error" in ended.stderr and "Traceback" not in ended.stderr
    assert good_steps(tmp_path / "run") == []
    run("train", settings, tmp_path)
    assert good_steps(tmp_path / "run")[-1] == STEPS
