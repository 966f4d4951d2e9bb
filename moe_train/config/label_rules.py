"""Rules between the task and the texts: a class can be learnt only where each text has one."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.schema import DataConfig
from moe_train.config.task import LanguageTask, SentimentTask
from moe_train.errors import Problem

WITHOUT_LABELS = ("shakespeare", "wikipedia", "mix", "tokens")
"""Sources whose texts have no classes."""
LABELS_ONLY = ("vader", "rotten_tomatoes")
"""Sources of single labelled sentences, which are no text to learn a language from."""


def label_problems(data: DataConfig, task: LanguageTask | SentimentTask) -> Iterator[Problem]:
    """Yield what is wrong between ``data`` and ``task``."""
    if isinstance(task, SentimentTask):
        yield from class_problems(task)
        if data.source in WITHOUT_LABELS:
            remedy = "choose data=vader, rotten_tomatoes or imdb, or give your own texts: data=labelled data.path=..."
            yield Problem("data.source", data.source, "has no classes to learn for task.kind=sentiment", remedy)
        if data.text_field == data.label_field:
            rule = "is the field of the text, too"
            yield Problem("data.label_field", data.label_field, rule, "name the field that holds the class")
        return
    remedy = "choose another data=, or train a classifier with task=sentiment"
    places = {"data.source": data.source} | {f"data.parts.{label}.source": p.source for label, p in data.parts.items()}
    for key, source in places.items():
        if source in LABELS_ONLY:
            yield Problem(key, source, "holds labelled sentences for task.kind=sentiment", remedy)


def class_problems(task: SentimentTask) -> Iterator[Problem]:
    """Yield what is wrong with the names of the classes."""
    if task.classes is None:
        return
    shown = ",".join(task.classes)
    if len(task.classes) < 2:
        yield Problem("task.classes", shown, "there is nothing to tell apart", "name two classes or more")
    if len(set(task.classes)) < len(task.classes):
        yield Problem("task.classes", shown, "names a class twice", "name each class once")
    if any(name != name.strip() or not name for name in task.classes):
        rule = "has a name that is empty, or with white space at an end"
        yield Problem("task.classes", shown, rule, "name each class by its label")
