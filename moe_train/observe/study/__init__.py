"""A study: many runs of equal tokens that differ in one thing, as one table and one picture."""

from moe_train.observe.study.callback import StudyCallback
from moe_train.observe.study.result import write_study

__all__ = ["StudyCallback", "write_study"]
