"""The first pass over a corpus: how much there is, what it is, and which documents are held out."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from moe_train.data.progress import ShowProgress
from moe_train.data.sources import Source
from moe_train.errors import DataError, Problem


@dataclass(frozen=True)
class Survey:
    """What one pass over the documents finds.

    Attributes:
        hashes: uint64, one per document, of its text.
        total_bytes: bytes of UTF-8 of all documents.
        domains: labels in the order of their first document.
        content: 64 hex digits; depends on every text, its label and their order.
    """

    hashes: np.ndarray
    total_bytes: int
    domains: tuple[str, ...]
    content: str

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.hashes)

    def heldout(self, fraction: float) -> np.ndarray:
        """Return a bool per document: True for the ceil(fraction · N) documents with the smallest hashes.

        A document and its copies have one hash, so that they are on the same side; copies can add to the count.

        Raises:
            DataError: nothing would be left for training.
        """
        count = math.ceil(fraction * self.num_documents)
        if count == 0:
            return np.zeros(self.num_documents, dtype=bool)
        limit = np.partition(self.hashes, count - 1)[count - 1]
        heldout: np.ndarray = self.hashes <= limit
        if heldout.all():
            different = len(np.unique(self.hashes))
            rule = f"leaves nothing to train on: the split is by document, and there is only {different} different"
            remedy = "give more documents (a .txt file is cut at blank lines), or lower it (0: no evaluation)"
            raise DataError(Problem("data.heldout_fraction", fraction, rule, remedy))
        return heldout


def survey(source: Source, progress: ShowProgress) -> Survey:
    """Read every document once; memory grows by 8 bytes per document.

    Raises:
        DataError: unreadable text, or no documents at all.
    """
    hashes, total_bytes, content = array("Q"), 0, blake2b(digest_size=32)
    domains: dict[str, None] = {}
    with progress("reading the corpus", None) as advance:
        for document in source.documents():
            encoded = document.text.encode()
            digest = blake2b(encoded, digest_size=16).digest()
            hashes.append(int.from_bytes(digest[:8], "big"))
            content.update(digest + blake2b(document.domain.encode(), digest_size=16).digest())
            domains[document.domain] = None
            total_bytes += len(encoded)
            advance(len(encoded))
    if not hashes:
        raise DataError(Problem("data", None, "the corpus has no documents", "check data.source and data.path"))
    return Survey(np.frombuffer(hashes, dtype=np.uint64), total_bytes, tuple(domains), content.hexdigest())
