"""What a run folder says about its run, for those who start from one."""

from __future__ import annotations

from pathlib import Path

import yaml

from moe_train.config.schema import TrainConfig
from moe_train.config.validate import validate
from moe_train.errors import ConfigError, DataError, Problem

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / CONFIG).is_file()


def read_config(run_dir: Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        DataError: the folder holds no run.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise DataError(Problem("run.dir", run_dir, "holds no config.yaml", "name the folder of a run: runs/NAME"))
    return validate(yaml.safe_load(path.read_text()), TrainConfig, lambda config: [])


def require_writer(run_dir: Path) -> None:
    """Refuse a run whose model writes no text.

    Raises:
        ConfigError: it tells the class of texts.
        DataError: the folder holds no run.
    """
    if read_config(run_dir).model.classifier is not None:
        rule = "is a run of task=sentiment: its model tells the class of a text and writes none"
        remedy = f'ask it with: python -m moe_train.evaluate run.dir={run_dir} text="..."'
        raise ConfigError(Problem("run.dir", run_dir, rule, remedy))


def require_classifier(run_dir: Path) -> None:
    """Refuse a run whose model cannot tell the class of a text.

    Raises:
        ConfigError: it is a language model.
        DataError: the folder holds no run.
    """
    if read_config(run_dir).model.classifier is None:
        rule = f"{run_dir} is a run of task=language: its model continues texts and knows no classes"
        remedy = f'leave text out, or ask it with: python -m moe_train.generate run.dir={run_dir} prompt="..."'
        raise ConfigError(Problem("text", None, rule, remedy))
