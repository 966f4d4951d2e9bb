"""The keys of the task: what a model learns from its texts."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from moe_train.config.base import Strict


class LanguageTask(Strict):
    """Predict the next token."""

    kind: Literal["language"] = "language"
    """Kind of task."""


class SentimentTask(Strict):
    """Tell the class of a text."""

    kind: Literal["sentiment"] = "sentiment"
    """Kind of task."""
    classes: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Names of the classes, in the order of their numbers; null: those of the source, or the labels that are found in
    the training texts, whole numbers by value, then words by the alphabet."""


TaskConfig: TypeAlias = Annotated[LanguageTask | SentimentTask, Field(discriminator="kind")]
