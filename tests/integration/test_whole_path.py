"""From a text to a report through the commands, on one rank: what each prints, writes and leaves as it was."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from launch import Ended, assert_same_tensors, checkpoint_path, curve, records, run

STEPS = 120
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_" + "secretsecretsecretsecret"}
TRAIN_KEYS = [
    "kind", "step", "loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_ms",
    "data_wait_ms", "exchange_ms", "memory_gib", "mfu",
]  # fmt: skip
LAYER_KEYS = ["load", "dropped_fraction", "max_violation", "entropy", "dead_experts"]


@dataclass(frozen=True)
class Path_:
    """The folder of the run and what each command printed."""


@dataclass(frozen=True)
class Whole:
    """A run and what the commands said."""

    run_dir: Path
    prepared: Ended
    trained: Ended
    again: Ended
    before_again: list[tuple]


@pytest.fixture(scope="module")
def whole(tiny: list[str], data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    train = [*tiny, "run.dir=run", "run.name=whole", f"train.steps={STEPS}", "eval.every=60", "eval.batches=1"]
    train += ["optim.lr=1e-2", "checkpoint.every=60", "checkpoint.keep=3"]
    prepared = run("prepare", data, folder)
    trained = run("train", train, folder, variables=SECRETS)
    (folder / "first").mkdir()
    (folder / "run" / "checkpoints" / "step_00000060").rename(folder / "first" / "step_00000060")
    (folder / "first" / "step_00000060").rename(folder / "run" / "checkpoints" / "step_00000060")
    return Whole(folder / "run", prepared, trained, trained, [])
