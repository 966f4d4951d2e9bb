"""From examples to texts that differ, each with the number of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.data.labelled.sources import LabelledSource
from moe_train.data.progress import ShowProgress
from moe_train.errors import DataError, Problem

MOST_SHOWN = 20
"""Bad rows that are named one by one; of the others the number is told."""
Votes = Mapping[str, Sequence[str]]
"""The classes that the copies of each text have."""


@dataclass(frozen=True)
class Collection:
    """All different texts of a source.

    Attributes:
        texts: N texts, no two alike.
        labels_N: int64, class numbers.
        classes: names by number.
        examples: rows that the source gave, those with an empty text not counted.
        conflicts: texts whose copies have different classes.
    """

    texts: Sequence[str]
    labels_N: np.ndarray
    classes: tuple[str, ...]
    examples: int
    conflicts: int


def collect(source: LabelledSource, given: tuple[str, ...] | None, progress: ShowProgress) -> Collection:
    """Read a source; the copies of a text become one.

    It gets the class that most of them have, in a tie the first class: the order of the rows changes nothing but that
    of the texts.

    Args:
        source: where the examples are.
        given: names of the classes in the order of their numbers; None: those of the source, or all its labels.
        progress: display of how far it is.

    Raises:
        DataError: bad rows and rows of unknown classes, all together; fewer than two classes; labels that are none.
    """
    own = source.classes()
    if own and given and set(own) != set(given):
        rule = f"the classes of the data are {', '.join(own)}"
        raise DataError(Problem("task.classes", ",".join(given), rule, "name these, in any order, or leave it out"))
    votes = read_votes(source, given or own, progress)
    classes = given or own or in_order({label for labels in votes.values() for label in labels})
    check_classes(classes, votes, are_found=given is None and own is None)
    number = {name: place for place, name in enumerate(classes)}
    labels = [min(number[name] for name in most_frequent(names)) for names in votes.values()]
    return Collection(
        texts=list(votes),
        labels_N=np.array(labels, dtype=np.int64),
        classes=classes,
        examples=sum(map(len, votes.values())),
        conflicts=sum(len(set(names)) > 1 for names in votes.values()),
    )


def read_votes(source: LabelledSource, known: tuple[str, ...] | None, progress: ShowProgress) -> Votes:
    """Read all examples; texts stand in the order of their first copy.

    Raises:
        DataError: with the bad rows of the source and those of classes that are not known.
    """
    votes: dict[str, list[str]] = {}
    problems: list[Problem] = []
    try:
        with progress("reading the texts", None) as advance:
            for example in source.examples():
                if (name := class_name(example.label, known)) is None:
                    rule = f"its class {example.label!r} is none of {', '.join(known or ())}"
                    remedy = "mend the row, or name all classes in task.classes"
                    problems.append(Problem(example.place, None, rule, remedy))
                elif example.text:
                    votes.setdefault(example.text, []).append(name)
                    advance(len(example.text.encode()))
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(first_of(problems))
    return votes


def first_of(problems: Sequence[Problem]) -> list[Problem]:
    """Return the first problems, and a last one that says how many there are besides."""
    shown, hidden = list(problems[:MOST_SHOWN]), len(problems) - MOST_SHOWN
    if hidden > 0:
        shown.append(Problem("data", None, f"{hidden} more rows are like these", "mend or remove them, too"))
    return shown


def class_name(label: str, known: tuple[str, ...] | None) -> str | None:
    """Return the name of the class that a label means; None: it means none.

    Args:
        label: a name, or where the classes are known the number of one.
        known: names in the order of their numbers; None: every label is a name.
    """
    if known is None or label in known:
        return label
    return known[int(label)] if is_number(label) and 0 <= int(label) < len(known) else None


def most_frequent(names: Sequence[str]) -> list[str]:
    """Return the names that occur most often."""
    counts = Counter(names)
    return [name for name, count in counts.items() if count == max(counts.values())]


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels in alphabetical order, whole numbers by their value before words."""
    return tuple(sorted(labels, key=lambda label: (0, int(label), "") if is_number(label) else (1, 0, label)))


def is_number(label: str) -> bool:
    """Tell whether a label is a whole number."""
    return label.removeprefix("-").isdecimal()


def check_classes(classes: tuple[str, ...], votes: Votes, are_found: bool) -> None:
    """Refuse texts from which nothing can be learnt.

    Args:
        classes: names by number.
        votes: the texts.
        are_found: the classes are all labels that were found, and may be none at all: identifiers, or ratings.

    Raises:
        DataError: no texts; fewer than two classes; about as many as there are texts.
    """
    if not votes:
        raise DataError(Problem("data", None, "the source has no texts", "check data.source and data.path"))
    if len(classes) < 2:
        rule = f"all {len(votes)} texts are of the class {classes[0]}"
        raise DataError(Problem("data", None, rule, "give texts of two classes or more"))
    if are_found and len(classes) > max(2, len(votes) // 2):
        rule = f"data.label_field has {len(classes)} different values in {len(votes)} texts: these are no classes"
        raise DataError(Problem("data", None, rule, "name the field that holds the class, or give more texts"))
