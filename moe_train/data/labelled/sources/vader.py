"""23,703 tweets, product and film reviews and newspaper lines with the mean of at least 20 human ratings each."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_train.config.schema import SourceConfig
from moe_train.data.labelled.sources.base import Example
from moe_train.data.sources.base import Identity
from moe_train.errors import DataError, Problem

KINDS = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
"""One file per kind of text: ``id<TAB>mean rating<TAB>text``."""
NEUTRAL_BELOW = 1.0
"""Absolute mean rating, on the scale of the ratings from -4 to 4, from which on a text is not neutral."""
LEXICON = "vader_sentiment_lexicon.txt"
"""``word<TAB>mean rating<TAB>standard deviation<TAB>the ratings``, in Latin-1."""


class Vader:
    """Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis", the ground truth.

    7,349 negative, 7,854 neutral and 8,500 positive texts. 10,605 of them are the films' that Rotten Tomatoes has, too:
    never train on one and test on the other.
    """

    def __init__(self, config: SourceConfig) -> None:
        pass

    def classes(self) -> tuple[str, ...]:
        """Return the classes."""
        return ("negative", "neutral", "positive")

    def examples(self) -> Iterator[Example]:
        """Stream the texts, file by file."""
        for path in rating_files():
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    _, rating, text = line.split("\t")
                    yield Example(html.unescape(text).strip(), class_of(float(rating)), f"{path.name}, line {number}")

    def identity(self) -> Identity:
        """Return the release that the files are from: it does not change."""
        rating_files()
        return {"package": "vaderSentiment", "version": "0.5"}


def class_of(rating: float) -> str:
    """Return the class of a mean rating between -4 and 4."""
    if abs(rating) < NEUTRAL_BELOW:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def rating_files(folder: Path | None = None) -> list[Path]:
    """Return the files of the ratings.

    Args:
        folder: where they are; None: where ``scripts/setup.sh`` puts them, in the environment of this Python.

    Raises:
        DataError: one is missing.
    """
    return fetched([f"{kind}_GroundTruth.txt" for kind in KINDS], folder)


def lexicon_file(folder: Path | None = None) -> Path:
    """Return the file of the rated words; see `rating_files`."""
    return fetched([LEXICON], folder)[0]


def fetched(names: list[str], folder: Path | None) -> list[Path]:
    """Return files by their names; see `rating_files`."""
    folder = folder or Path(sys.prefix) / "share" / "moe_train" / "vader"
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        remedy = "fetch the ratings, as scripts/setup.sh does: python scripts/fetch_vader.py"
        raise DataError(Problem(str(folder), None, f"does not hold {', '.join(missing)}", remedy))
    return files
