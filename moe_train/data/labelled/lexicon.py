"""Words that people have rated, as runs of a tokenizer's tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from moe_train.config.classifier import LexiconConfig
from moe_train.data.labelled.sources.vader import lexicon_file
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, Problem

KEY = "model.classifier.lexicon"
BEFORE = "x"
"""A word is encoded behind this one and a space, as it mostly stands in texts."""
MOST_TOLD = 8
"""Bad lines that are told one by one."""


@dataclass(frozen=True)
class RatedRuns:
    """The words of a lexicon that a model can find.

    Attributes:
        ratings: of each run of tokens.
        account: in words, how many there are, and how many were passed over.
    """

    ratings: dict[tuple[int, ...], float]
    account: str


def open_lexicon(config: LexiconConfig, tokenizer: Tokenizer) -> RatedRuns:
    """Return the words of a lexicon as runs of tokens; words with the same tokens have the mean of their ratings.

    Args:
        config: the file, how long runs may be, and how many there is room for.
        tokenizer: makes the tokens; if it makes letters small, it does so here.

    Raises:
        DataError: the file is missing, or has lines that are no words with ratings (all are told), or no word that is
            short enough, or more than there is room for.
    """
    # The file of VADER is in Latin-1: it has smileys with a thorn for a tongue.
    path, encoding = (lexicon_file(), "latin-1") if config.path is None else (Path(config.path).expanduser(), "utf-8")
    words = rated_words(path, encoding)
    runs = runs_of([word for word, _ in words], tokenizer)
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for run, (_, rating) in zip(runs, words, strict=True):
        if 0 < len(run) <= config.longest:
            found[run].append(rating)
    if not found:
        rule = f"no word of {path} has so few tokens: the shortest has {min(map(len, runs))}"
        remedy = "raise it (to 8 at most), or choose a tokenizer of words, not of bytes"
        raise DataError(Problem(f"{KEY}.longest", config.longest, rule, remedy))
    if len(found) > config.rows:
        rule = f"{path} has {len(found):,} words"
        raise DataError(Problem(f"{KEY}.rows", config.rows, rule, f"set it to {len(found)} or more"))
    account = f"lexicon {path.name}: {len(words):,} words, {len(found):,} different runs of tokens"
    if long := len(words) - sum(map(len, found.values())):
        account += f"; {long:,} words of more than {config.longest} tokens are passed over"
    return RatedRuns({run: fmean(ratings) for run, ratings in found.items()}, account)


def rated_words(path: Path, encoding: str) -> list[tuple[str, float]]:
    """Return the words of a file with their ratings, in its order; empty lines are passed over.

    Raises:
        DataError: it cannot be read, has no words, or has lines that are no words with ratings: all are told.
    """
    try:
        lines = path.read_text(encoding=encoding).removeprefix("\ufeff").split("\n")
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise DataError(Problem(f"{KEY}.path", path, rule, "give the path of a file of words and ratings")) from error
    except UnicodeDecodeError as error:
        rule = f"byte {error.start} is not UTF-8 ({error.reason})"
        raise DataError(Problem(f"{KEY}.path", path, rule, "convert the file to UTF-8")) from error
    told = {number: rated_word(line) for number, line in enumerate(lines, start=1) if line.strip()}
    bad = [number for number, word in told.items() if word is None]
    remedy = "write a word, a tab and a number on each line"
    problems = [
        Problem(f"{path}, line {number}", None, "is no word with a rating behind a tab", remedy)
        for number in bad[:MOST_TOLD]
    ]
    if len(bad) > MOST_TOLD:
        problems.append(Problem(str(path), None, f"has {len(bad) - MOST_TOLD:,} more such lines", remedy))
    if not told:
        problems.append(Problem(f"{KEY}.path", path, "holds no word", remedy))
    if problems:
        raise DataError(problems)
    return [word for word in told.values() if word is not None]


def rated_word(line: str) -> tuple[str, float] | None:
    """Return the word of a line and its rating; None: it has none."""
    word, _, rest = line.partition("\t")
    try:
        rating = float(rest.split("\t")[0])
    except ValueError:
        return None
    return (word.strip(), rating) if word.strip() and math.isfinite(rating) else None


def runs_of(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Return the tokens of each word behind a space; none of a word that would change the tokens before it."""
    before, *behind = (
        tuple(run.tolist()) for run in tokenizer.encode_batch([BEFORE, *(f"{BEFORE} {w}" for w in words)])
    )
    return [run[len(before) :] if run[: len(before)] == before else () for run in behind]
