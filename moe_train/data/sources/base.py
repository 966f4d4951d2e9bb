"""What every source of text gives: documents in a fixed order, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from moe_train.errors import DataError, Problem

Result = TypeVar("Result")

Identity = dict[str, object]
"""JSON-able description of everything a source's documents depend on."""


@dataclass(frozen=True)
class Document:
    """One text, the unit of the held-out split.

    Attributes:
        text: the text; never empty.
        domain: label of where it comes from.
    """

    text: str
    domain: str


class Source(Protocol):
    """A corpus that can be read any number of times, in the same order each time."""

    def documents(self) -> Iterator[Document]:
        """Stream the documents; memory does not grow with the corpus.

        Raises:
            DataError: text that cannot be read; names file and place.
        """
        ...

    def identity(self) -> Identity:
        """Return what the documents depend on, found without reading them where that is possible."""
        ...


def call_all(calls: Iterable[Callable[[], Result]]) -> list[Result]:
    """Return the results of all calls.

    Raises:
        DataError: with the problems of every call that fails, so that a user mends them in one go.
    """
    results: list[Result] = []
    problems: list[Problem] = []
    for call in calls:
        try:
            results.append(call())
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return results
