"""A router whose experts choose tokens: evaluation tells the causal loss, and beside it the one that looks ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import records, run

EXPERT_CHOICE = ["model/ffn/router=expert_choice", "model/ffn/balance=[]", "model.ffn.router.allow_future_leak=true",
                 "model.ffn.num_experts=8"]  # fmt: skip


@pytest.mark.slow
def test_evaluation_tells_both_losses_of_a_run_with_expert_choice(tiny: list[str], tmp_path: Path) -> None:
    """On any layout; they are those of the whole split with which the training itself ends."""
    trained = [*tiny, *EXPERT_CHOICE, "run.dir=run", "train.steps=3", "parallel.ep=2"]
    run("train", trained, tmp_path, ranks=2)
    last = records(tmp_path / "run", "eval")[-1]
    for ranks in (1, 2):
        asked = ["run.dir=run", "eval.batches=null", f"parallel.ep={ranks}"]
        told = json.loads(run("evaluate", asked, tmp_path, ranks=ranks).stdout)
        assert told["step"] == 3 and 0 < told["loss"] < 7
        assert told["loss"] != told["loss_looking_ahead"], "other tokens are taken where later ones are known"
        for name in ("loss", "perplexity", "loss_looking_ahead", "bits_per_byte_looking_ahead"):
            assert told[name] == pytest.approx(last[name], rel=1e-5), (name, ranks)
