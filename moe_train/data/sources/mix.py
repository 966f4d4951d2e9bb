"""Several sources at fixed shares of bytes, each document labelled with its domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from moe_train.data.sources.base import Document, Identity, Source, call_all
from moe_train.errors import DataError, Problem


@dataclass(frozen=True)
class WeightedSource:
    """A part of a mix.

    Attributes:
        source: the documents, labelled with the part's name.
        weight: share of the mix's bytes, relative to the other parts.
    """

    source: Source
    weight: float


class Mix:
    """Parts at their shares of bytes. Nothing is repeated: the part that is shortest for its share sets the total."""

    def __init__(self, parts: Mapping[str, WeightedSource]) -> None:
        self.parts = parts
        self._limits: dict[str, int] | None = None

    def documents(self) -> Iterator[Document]:
        """Stream part after part; the first call reads all parts once more, to measure them.

        Raises:
            DataError: a part that cannot be read or has no documents.
        """
        limits = self._measured_limits()
        for label, part in self.parts.items():
            for document in part.source.documents():
                if mix_hash(document.text) <= limits[label]:
                    yield document

    def identity(self) -> Identity:
        """Return the weight and identity of each part, in their order.

        Raises:
            DataError: with the problems of all parts.
        """
        identities = call_all(part.source.identity for part in self.parts.values())
        parts = zip(self.parts.items(), identities, strict=True)
        return {label: {"weight": part.weight, "source": identity} for (label, part), identity in parts}

    def _measured_limits(self) -> dict[str, int]:
        if self._limits is None:
            sizes = {label: measure(label, part.source) for label, part in self.parts.items()}
            total_weight = sum(part.weight for part in self.parts.values())
            shares = {label: part.weight / total_weight for label, part in self.parts.items()}
            mixed_bytes = min(sizes[label].total_bytes / share for label, share in shares.items())
            self._limits = {label: sizes[label].limit(mixed_bytes * share) for label, share in shares.items()}
        return self._limits


@dataclass(frozen=True)
class PartSize:
    """Length and hash of every document of a part.

    Attributes:
        hashes: uint64, one per document.
        lengths: int64, bytes of UTF-8 per document.
    """

    hashes: np.ndarray
    lengths: np.ndarray

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole part."""
        return int(self.lengths.sum())

    def limit(self, wanted_bytes: float) -> int:
        """Return the largest hash that is kept, so that the kept documents have as nearly ``wanted_bytes`` as they can.

        Documents are taken in the order of their hashes, at least one: which of them stay depends on their text alone.
        """
        order = np.argsort(self.hashes, kind="stable")
        taken_bytes = np.cumsum(self.lengths[order])
        count = int(np.argmin(np.abs(taken_bytes - wanted_bytes)))
        return int(self.hashes[order[count]])


def measure(label: str, source: Source) -> PartSize:
    """Read a part once and return the size of its documents."""
    measured = [(mix_hash(document.text), len(document.text.encode())) for document in source.documents()]
    if not measured:
        remedy = "check its path, or remove the part"
        raise DataError(Problem(f"data.parts.{label}", None, "has no documents", remedy))
    hashes, lengths = zip(*measured, strict=True)
    return PartSize(np.array(hashes, dtype=np.uint64), np.array(lengths, dtype=np.int64))


def mix_hash(text: str) -> int:
    """Return a 64-bit hash of ``text``, independent of the one that chooses the held-out documents.

    With the same hash, the documents with small hashes would be kept by the mix and then held out of the training.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"mix").digest(), "big")
