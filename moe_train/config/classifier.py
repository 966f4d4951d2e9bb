"""The keys of a model that tells the class of a text instead of the next token."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveInt

from moe_train.config.base import Fraction, Strict


class TextHeadConfig(Strict):
    """What all heads over whole texts have in common: a text's vector is the mean of its tokens' final ones."""

    num_classes: PositiveInt | None = None
    """Classes C; null: as many as the data has, and so it stands in a run's config.yaml."""
    token_dropout: Fraction = 0.0
    """Share of the tokens that training leaves out of a text, anew in each step."""


class LinearHeadConfig(TextHeadConfig):
    """One linear map from the text's vector to the classes."""

    kind: Literal["linear"] = "linear"
    """Kind of head."""


class ExpertHeadConfig(TextHeadConfig):
    """Experts from the text's vector to the classes: model.ffn says how many, how they are chosen and kept even.

    An expert is a network of linear maps with ReLU between; with model.layers=0 the vector is the mean of the tokens'
    embeddings.
    """

    kind: Literal["experts"] = "experts"
    """Kind of head."""
    hidden_dims: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (64, 32)
    """Hidden widths of one expert, in order."""


HeadConfig: TypeAlias = LinearHeadConfig | ExpertHeadConfig
