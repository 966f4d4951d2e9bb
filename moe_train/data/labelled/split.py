"""Which labelled texts are held out: a share of each class, whatever the order of the rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from moe_train.errors import DataError, Problem


def split_hashes(texts: Iterable[str], seed: int) -> np.ndarray:
    """Return a hash per text, uint64 [N], that decides its side and its place.

    It is that of the text's letters alone: texts that differ in signs, spaces or capitals have one hash, so that
    near copies are not learnt on one side and asked for on the other.
    """
    key = seed.to_bytes(8, "big")
    digests = [blake2b(letters(text).encode(), digest_size=8, key=key).digest() for text in texts]
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)


def letters(text: str) -> str:
    """Return the letters of a text in lower case, without signs and numbers; the text itself where it has none."""
    return re.sub(r"[\W\d_]+", "", text.casefold()) or text


def split_order(texts: Sequence[str], seed: int) -> np.ndarray:
    """Return the order of texts by their hashes, int64 [N]; of those with one hash, by the texts themselves."""
    hashes = split_hashes(texts, seed).tolist()
    return np.array(sorted(range(len(texts)), key=lambda n: (hashes[n], texts[n])), dtype=np.int64)


def stratified(labels_N: np.ndarray, classes: Sequence[str], fraction: float) -> np.ndarray:
    """Return a bool per text: True for the first texts of each class, as many as ``fraction`` of them, rounded.

    Args:
        labels_N: class numbers of texts in the order of their hashes.
        classes: names by number, for errors.
        fraction: share to hold out.

    Raises:
        DataError: a class has nothing left to train on; names all of them.
    """
    heldout_N = np.zeros(len(labels_N), dtype=bool)
    problems = []
    for number, name in enumerate(classes):
        own = np.flatnonzero(labels_N == number)
        heldout_N[own[: int(fraction * len(own) + 0.5)]] = True
        if heldout_N[own].all():
            rule = f"leaves nothing to train on of the {len(own)} texts of class {name}"
            remedy = "give more of them, lower data.heldout_fraction, or leave the class out of task.classes"
            problems.append(Problem("data.heldout_fraction", fraction, rule, remedy))
    if problems:
        raise DataError(problems)
    return heldout_N


def shared_texts(first: Iterable[str], second: Iterable[str]) -> int:
    """Return how many texts of ``first`` are in ``second``, too, when letters alone count and copies count once.

    The test to make before one set is used to judge what was learnt from another.
    """
    return len({letters(text) for text in first} & {letters(text) for text in second})
