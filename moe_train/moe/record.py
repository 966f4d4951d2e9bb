"""What all layers with experts have in common, seen from the training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol, Self

from torch import Tensor


@dataclass(frozen=True)
class LayerRecord(ABC):
    """What one layer did with the valid tokens of one forward pass; padding counts nowhere.

    Every field is a sum over tokens, so that records of ranks and micro-batches add up.

    Attributes:
        tokens: scalar int64, valid tokens.
        statistics: per loss of the layer its fp64 vector; differentiable.
    """

    tokens: Tensor
    statistics: tuple[Tensor, ...] = field(kw_only=True)

    @abstractmethod
    def figures(self) -> dict[str, object]:
        """Return what is written down of the layer, from the sums of a whole step on the host."""

    @classmethod
    def sum_names(cls) -> list[str]:
        """Return the names of the fields that are no statistics."""
        return [field.name for field in fields(cls) if field.name != "statistics"]

    def tensors(self) -> list[Tensor]:
        """Return all sums in a fixed order."""
        return [*(getattr(self, name) for name in self.sum_names()), *self.statistics]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> Self:
        """Return the record with these sums, in the order of `tensors`."""
        names = cls.sum_names()
        sums = dict(zip(names, tensors[: len(names)], strict=True))
        return cls(**sums, statistics=tuple(tensors[len(names) :]))

    def detached(self) -> Self:
        """Return the record without gradients."""
        return self.from_tensors([tensor.detach() for tensor in self.tensors()])

    def __add__(self, other: Self) -> Self:
        """Return the record of both forward passes."""
        return self.from_tensors([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])


class LayerLosses(Protocol):
    """The losses that a layer has beside the cross-entropy."""

    @property
    def needs_totals(self) -> bool:
        """Whether the gradient of a loss depends on statistics of the whole optimizer step."""

    def share(self, record: LayerRecord, totals: tuple[Tensor, ...]) -> Tensor:
        """Return a scalar whose gradient is this record's part of that of the weighted losses, times n."""

    def values(self, totals: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return n times each unweighted loss, by name, from the statistics of the whole step."""


@dataclass(frozen=True)
class LossPerToken:
    """The loss of a layer that has one and of which each token has its own: the record's statistic is its sum.

    Attributes:
        name: by which it is told.
        coef: its weight relative to the cross-entropy per token.
    """

    name: str
    coef: float

    @property
    def needs_totals(self) -> bool:
        """Whether the gradient depends on statistics of the whole step: it does not."""
        return False

    def share(self, record: LayerRecord, totals: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted loss of a record, times its number of tokens."""
        return self.coef * record.statistics[0].sum()

    def values(self, totals: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return n times the unweighted loss, by name."""
        return {self.name: totals[0].sum()}


class LayerKey(NamedTuple):
    """Which layer of a model a record is of."""

    depth: int
    """Of its block, from 0; then the modules of multi-token prediction."""
    part: str = ""
    """Of the block: the feed-forward part has no name, others do."""

    @property
    def name(self) -> str:
        """The name that records use: ``layer_03``, ``layer_03_values``."""
        return f"layer_{self.depth:02d}" + (f"_{self.part}" if self.part else "")


class ExpertLayer(Protocol):
    """A layer that leaves a record: its tokens choose experts, are coupled by a graph, or choose its depth."""

    @property
    def balance(self) -> LayerLosses:
        """Its losses."""

    def figures(self) -> dict[str, object]:
        """Return what is written down of the layer's own state."""


@dataclass(frozen=True)
class LayerOutput:
    """What a layer with experts returns.

    Attributes:
        y_BSD: [B, S, D] what it adds to the residual stream; zeros for a token that no expert took.
        record: sums, from which the step forms the losses and the figures.
    """

    y_BSD: Tensor
    record: LayerRecord
