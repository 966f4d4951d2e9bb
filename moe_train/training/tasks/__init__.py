"""What differs between tasks, behind one protocol (`base.Task`); nobody else asks which task a run has.

To add one: a section with its ``kind`` in `moe_train.config.task`, a class in a file of its own here, a line below.
"""

from __future__ import annotations

from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.data.corpus import LeaderFirst
from moe_train.training.tasks.base import Task
from moe_train.training.tasks.language import LanguageModelling
from moe_train.training.tasks.sentiment import Classification

__all__ = ["Task", "open_task"]


def open_task(config: TrainConfig, leader_first: LeaderFirst) -> Task:
    """Open the texts of a run on this rank; the leader prepares them first if that was not done before.

    Args:
        config: validated.
        leader_first: called on every rank.

    Raises:
        ConfigError, DataError: the texts cannot be read, or do not fit the configuration.
    """
    if isinstance(config.task, SentimentTask):
        return Classification.open(config, config.task, leader_first)
    return LanguageModelling.open(config, leader_first)
