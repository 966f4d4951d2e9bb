"""Weights & Biases: one run id over all lives of a run, and never a reason for the training to wait or to stop."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from moe_train.observe.files import write_atomically
from moe_train.observe.records import Record
from moe_train.observe.redact import redact, redact_all
from moe_train.observe.sinks.base import RunContext, Status
from moe_train.observe.sinks.wandb_keys import wandb_values

LOGGER = logging.getLogger(__name__)

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 25  # and a few seconds for its service to stop: the process ends within 30
STEP = "train/step"

SUMMARIES = {
    "train/loss": "min",
    "val/loss": "min",
    "val/bits_per_byte": "min",
    "perf/tok_s": "max",
    "perf/mfu": "max",
    "mem/peak_gib": "max",
}

Mode = Literal["online", "offline"]


class WandbSink:
    """Logs train and eval records to one Weights & Biases run; events stay in ``metrics.jsonl``.

    Args:
        mode: where the records go; a failing ``online`` becomes ``offline`` with one warning.
    """

    name = "wandb"

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._run: Any = None

    def start(self, context: RunContext) -> None:
        """Open the run, under the id that its earlier lives had.

        Raises:
            ImportError: wandb is not installed.
            Exception: whatever wandb raises when it cannot even record offline.
        """
        # Its own telemetry has timeouts of its own, which would hold up the exit when the server hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").propagate = False  # it has its own debug.log
        wandb.setup(_settings(wandb))  # init() alone would still announce the login on the console
        options = _init_options(context, wandb)
        self._run = _open_online(wandb, options) if self._mode == "online" else wandb.init(mode="offline", **options)
        # The axis is ours: a resumed run repeats steps, which wandb's own counter cannot do.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        for key, summary in SUMMARIES.items():
            self._run.define_metric(key, step_metric=STEP, summary=summary)

    def write(self, record: Record) -> None:
        """Log the numbers of a train or eval record."""
        values = wandb_values(record)
        if values:
            self._run.log({STEP: record["step"], **values})

    def close(self, status: Status) -> None:
        """End the run within FINISH_TIMEOUT_S seconds and say how what is not uploaded yet gets there.

        Raises:
            RuntimeError: the upload was not done in time; the record on disk is whole.
        """
        run, self._run = self._run, None
        if run is None:
            return
        remedy = f"upload with: wandb sync {run.settings.sync_dir}"
        try:
            run.finish(exit_code=0 if status == "finished" else 1)
        except Exception as error:
            raise RuntimeError(f"{_first_line(error)}; {remedy}") from error
        if run.settings.mode == "offline":
            LOGGER.info("wandb recorded offline; %s", remedy)


def resolve_mode(mode: Literal["auto", "online", "offline", "disabled"], has_key: bool) -> Mode | None:
    """Return where wandb records to, or None for nowhere.

    Args:
        mode: the configured mode; ``auto`` is online with an API key, else offline.
        has_key: whether the environment holds an API key.
    """
    if mode == "auto":
        return "online" if has_key else "offline"
    return None if mode == "disabled" else mode


def run_id(run_dir: Path, fresh: bool) -> str:
    """Return the wandb id of the run in ``run_dir``, kept in ``wandb/run_id.txt`` over all its lives.

    It is written before wandb knows of it, so that a life that dies early leaves the id to the next.

    Args:
        run_dir: folder of the run.
        fresh: make a new id: what was recorded in this folder before is another run.
    """
    path = run_dir / "wandb" / "run_id.txt"
    known = "" if fresh or not path.exists() else path.read_text(encoding="utf-8").strip()
    if known:
        return known
    new = secrets.token_hex(4)
    write_atomically(path, new + "\n")
    return new


def _init_options(context: RunContext, wandb: Any) -> dict[str, Any]:
    """Return the arguments of ``wandb.init`` but for the mode."""
    config = context.config
    context.run_dir.mkdir(parents=True, exist_ok=True)
    return {
        "id": run_id(context.run_dir, fresh=config.checkpoint.resume == "never"),
        "resume": "allow",
        "dir": str(context.run_dir),
        "project": config.log.wandb.project,
        "name": config.run.name,
        "job_type": "train",
        "config": redact_all(config.model_dump(mode="json")),
        "settings": _settings(wandb),
    }


def _open_online(wandb: Any, options: dict[str, Any]) -> Any:
    """Return an online run, or an offline one, with a warning, when the service cannot be reached."""
    try:
        return wandb.init(mode="online", **options)
    except Exception as error:
        reason = redact(_first_line(error))
    # Its service still holds the run id for the failed attempt, and would refuse it to the next.
    wandb.teardown(exit_code=1)
    wandb.setup(_settings(wandb))
    run = wandb.init(mode="offline", **options)
    sync = f"wandb sync {run.settings.sync_dir}"
    LOGGER.warning("wandb cannot go online (%s); recording offline, upload with: %s", reason, sync)
    return run


def _settings(wandb: Any) -> Any:
    """Return settings that bound every wait, keep the console ours, and record no command line or git remote."""
    return wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        login_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,  # holds the command line, and with it whatever secret stands there
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
