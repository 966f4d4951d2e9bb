"""The keys of depth: whether every token passes every block."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveInt

from moe_train.config.base import Strict


class FullDepthConfig(Strict):
    """Every token passes every block."""

    kind: Literal["full"] = "full"
    """Kind of depth."""


class MixtureOfDepthsConfig(Strict):
    """A block takes its best tokens of each sequence, the others pass it by (Raposo et al. 2024, arXiv 2404.02258).

    In training the best are known only when the whole sequence is: evaluation and generation decide token by token.
    """

    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    """Kind of depth."""
    capacity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.125
    """Share of a sequence's tokens that a block takes, rounded up."""
    every: PositiveInt = 2
    """Every n-th block (the last of each n) takes only some, the others take all."""
    weight: Literal["linear", "sigmoid"] = "linear"
    """What a block's output is multiplied with: the router's score, or its sigmoid. From it the router learns."""
    causal: Literal["classifier", "predictor"] = "predictor"
    """How a token is chosen where later ones are not known. classifier: the score itself, trained to be positive for
    the best; this gradient reaches the model. predictor: a network of its own, trained for the same, which leaves the
    model alone."""
    causal_coef: NonNegativeFloat = 0.01
    """Weight of that training relative to the cross-entropy per token."""
    predictor_dim: PositiveInt = 64
    """Hidden width of the predictor."""


DepthConfig: TypeAlias = Annotated[FullDepthConfig | MixtureOfDepthsConfig, Field(discriminator="kind")]
