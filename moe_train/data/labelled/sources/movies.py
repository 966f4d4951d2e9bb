"""Film reviews with two classes: 8,530 sentences of Rotten Tomatoes, 25,000 whole reviews of IMDB."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from moe_train.config.schema import SourceConfig
from moe_train.data.labelled.sources.base import Example
from moe_train.data.sources.base import Identity
from moe_train.data.sources.imdb import REVIEWS

CLASSES = ("negative", "positive")


class Movies:
    """The rows of one site in the package's CSV file; both have as many negative as positive texts.

    Rotten Tomatoes: Pang and Lee 2005, "Seeing Stars". IMDB: Maas et al. 2011, "Learning Word Vectors for Sentiment
    Analysis"; 24,903 of its texts are different.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.site = config.source

    def classes(self) -> tuple[str, ...]:
        """Return the classes."""
        return CLASSES

    def examples(self) -> Iterator[Example]:
        """Stream the reviews of the site in the order of the file, which is sorted by class."""
        for path in REVIEWS.files():
            with path.open(encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file)
                for row in rows:
                    if row["source"] == self.site:
                        text = row["text"].replace("<br />", "\n").strip()
                        yield Example(text, CLASSES[int(row["label"])], f"{path.name}, line {rows.line_num}")

    def identity(self) -> Identity:
        """Return package, version and site."""
        return {**REVIEWS.identity(), "site": self.site}
