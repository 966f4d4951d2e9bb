"""What every source of labelled texts gives: examples in any order, the names of their classes, what they depend on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from moe_train.data.sources.base import Identity


@dataclass(frozen=True)
class Example:
    """A text and what a person said about it.

    Attributes:
        text: the text, without white space at its ends; empty ones are passed over later.
        label: name or number of its class.
        place: where it stands, for errors.
    """

    text: str
    label: str
    place: str


class LabelledSource(Protocol):
    """Labelled texts that can be read any number of times. Their order has no meaning: nothing depends on it."""

    def classes(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the order of their numbers; None: the labels themselves are all there is.

        Raises:
            DataError: as examples.
        """
        ...

    def examples(self) -> Iterator[Example]:
        """Stream the examples.

        Raises:
            DataError: after the last row, with all rows that are no examples; each names its place.
        """
        ...

    def identity(self) -> Identity:
        """Return what the examples depend on, found without reading them where that is possible."""
        ...


def as_label(value: object) -> str | None:
    """Return a value of a label column as the name or number of a class; None: it is neither.

    Whole numbers that are written as fractions are numbers all the same: pandas makes 1.0 of 1 in a column with gaps.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str) or (isinstance(value, float) and value.is_integer()):
        return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip()) or None
    return None
