"""Whatever a log does wrong, the training goes on, says so once, and ends well."""

from __future__ import annotations

from pathlib import Path

from launch import ROOT, good_steps, records, run

STEPS = 4


def test_a_broken_wandb_does_not_stop_the_run(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text("raise RuntimeError('this installation is broken')\n")
    settings = [*tiny, "run.dir=run", f"train.steps={STEPS}", "log.wandb.mode=offline"]
    path = {"PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}", "WANDB_MODE": None}
    ended = run("train", settings, tmp_path, variables=path)
    assert (ended.stdout + ended.stderr).count("log sink wandb failed and is switched off") == 1
    assert [row["step"] for row in records(tmp_path / "run", "train")] == list(range(1, STEPS + 1))
    assert good_steps(tmp_path / "run") == [STEPS]
