"""Whether a run is finished, so that a sweep that is started again passes it by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_train.config.compose import values_of
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError, Problem
from moe_train.observe.records import finite
from moe_train.observe.report.record import RunRecord

HOW_NOT_WHAT = (
    "run.name", "run.dir", "run.skip_finished", "train.micro_batch", "train.compile", "train.loss_chunk",
    "data.cache_dir", "data.shard_bytes", "tokenizer.boundary_token", "model.ffn.compute", "model.attention.compute",
    "parallel.", "checkpoint.", "eval.", "log.", "sample.",
)  # fmt: skip
"""Beginnings of the keys on which the outcome does not depend: how it is computed, what is told of it, and what the run
itself fills in."""


def final_loss(run: RunRecord) -> float | None:
    """Return the held-out loss of the final evaluation in nats per token, or None of a run that is not finished."""
    if not run.evals or not run.train or run.evals[-1]["step"] != run.setting("train.steps"):
        return None
    return finite(run.evals[-1].get("loss"))


def is_passed_by(config: TrainConfig) -> bool:
    """Whether the run folder holds this very run, finished; rank 0 says so.

    Ranks on several machines may not all see the folder: there no run is passed by.

    Raises:
        ConfigError: it holds another finished run, with each key in which they differ.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        return False
    folder = Path(config.run.dir).expanduser()
    run = RunRecord.load(folder)
    if final_loss(run) is None:
        return False
    problems = list(differences(run.config, config, folder))
    if problems:
        raise ConfigError(problems)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"finished before: {folder.resolve()}\n")
    return True


def differences(saved: Mapping[str, Any], config: TrainConfig, folder: Path) -> Iterator[Problem]:
    """Yield each key that decides about the outcome and was another one; keys younger than the run are passed over."""
    before = dict(values_of(dict(saved)))
    for key, value in values_of(config.model_dump(mode="json")):
        if key in before and before[key] != value and not key.startswith(HOW_NOT_WHAT):
            rule = f"the finished run in {folder} has {before[key]}"
            yield Problem(key, value, rule, "choose another run.name, or remove that folder")
