"""A run goes on at any layout and with any engine: one curve, one order of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import records, run

pytestmark = pytest.mark.slow

LIVES = [
    (4, ["parallel.ep=4"]),
    (2, ["parallel.ep=2", "parallel.dp_shard=2", "checkpoint.async=true"]),
    (1, ["parallel.ep=1", "train.micro_batch=4"]),
    (2, ["parallel.ep=2", "parallel.engine=deepspeed", "parallel.zero_stage=2"]),
]
STEPS = 10


def losses(folder: Path) -> dict[int, list[float]]:
    """Loss, balance loss and gradient norm by step."""
    found = {}
    for record in records(folder, "train"):
        found[record["step"]] = [record["loss"], record["aux_loss"], record["grad_norm"]]
    return found


def test_four_lives_on_four_layouts_make_the_run_of_one(tiny: list[str], tmp_path: Path) -> None:
    """The learning rate is constant after its warm-up, so that it does not depend on where a life ends."""
    model = ["model.ffn.num_experts=4", "model.ffn.router.kind=sigmoid", "model.ffn.balance.loss_free.rate=0.01"]
    same = [*tiny, *model, "train.precision=fp32", "optim.min_lr_ratio=1.0", "optim.warmup_steps=5"]
    for number, (ranks, layout) in enumerate(LIVES):
        run("train", [*same, *layout, "run.dir=lives", f"train.steps={STEPS * (number + 1)}"], tmp_path, ranks)
    run("train", [*same, "run.dir=one", f"train.steps={STEPS * len(LIVES)}"], tmp_path)
    found, truth = losses(tmp_path / "lives"), losses(tmp_path / "one")
    assert list(found) == list(truth) == list(range(1, STEPS * len(LIVES) + 1))
    for step, figures in truth.items():
        assert found[step] == pytest.approx(figures, rel=1e-5, abs=1e-5), f"step {step}"
    started = [record["step"] for record in records(tmp_path / "lives", "event") if record["event"] == "resumed"]
    assert started == [10, 20, 30]
