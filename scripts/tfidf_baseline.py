"""What linear models of words and pairs of words reach on the held-out texts of the sentiment study.

Usage: python scripts/tfidf_baseline.py vader rotten_tomatoes imdb        (needs: pip install scikit-learn)

Logistic regression on TF-IDF of runs of one and two words; and on the set of the same runs, each scaled by its
log-count ratio (NBSVM: Wang and Manning 2012), one model per class; of vader, also with the sums of the positive and
the negative ratings of the text's words in VADER's lexicon, as its recipe has them. Of each split the better of two
strengths of regularisation, so that the comparison errs in their favour.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.labelled.corpus import open_labelled
from moe_train.data.labelled.lexicon import rated_words
from moe_train.data.labelled.sources.vader import lexicon_file
from moe_train.data.labelled.store import TextStore

HELDOUT = 0.1
SPLITS = (0, 1, 2)
WORDS = r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]+"
"""Words, and runs of signs."""


def main(sources: list[str]) -> None:
    """Print a line per set of texts and model."""
    for source in sources:
        for name, model in (MODELS | (RATED if source == "vader" else {})).items():
            found = [accuracy(source, split, model) for split in SPLITS]
            each = ", ".join(f"{value:.4f}" for value in found)
            print(
                f"{source}, {name}: {statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} ({each})", flush=True
            )


def accuracy(source: str, split_seed: int, model: Callable[[TextStore, TextStore], list[np.ndarray]]) -> float:
    """Return the held-out accuracy on a set's texts, on the split that a run with this seed has."""
    data = DataConfig.model_validate({"source": source, "heldout_fraction": HELDOUT, "split_seed": split_seed})
    corpus = open_labelled(data, TokenizerConfig(kind="bytes"), SentimentTask(), lambda work: work())
    told = model(corpus.train, corpus.heldout)
    return max(float((classes_N == corpus.heldout.labels_N).mean()) for classes_N in told)


def tfidf(train: TextStore, heldout: TextStore) -> list[np.ndarray]:
    """Return the classes that logistic regression on TF-IDF tells, for each strength of regularisation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2))
    known, unknown = vectors.fit_transform(texts_of(train)), vectors.transform(texts_of(heldout))
    return [
        LogisticRegression(C=c, max_iter=500).fit(known, train.labels_N).predict(unknown).astype(np.int64)
        for c in (1.0, 10.0)
    ]


def nbsvm(train: TextStore, heldout: TextStore, with_lexicon: bool) -> list[np.ndarray]:
    """Return the classes that models of scaled sets of runs tell, for each strength of regularisation."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    sets = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=WORDS)
    known, unknown = sets.fit_transform(texts_of(train)), sets.transform(texts_of(heldout))
    rated = [lexicon_sums(texts_of(store)) if with_lexicon else None for store in (train, heldout)]

    def features(sets: Any, ratios: np.ndarray, sums_N2: np.ndarray | None) -> Any:
        scaled = sets.multiply(ratios).tocsr()
        return scaled if sums_N2 is None else hstack([scaled, sums_N2]).tocsr()

    def scores(label: int, c: float) -> np.ndarray:
        ratios = log_count_ratios(known, train.labels_N == label)
        model = LogisticRegression(C=c, max_iter=300).fit(features(known, ratios, rated[0]), train.labels_N == label)
        return np.asarray(model.decision_function(features(unknown, ratios, rated[1])))

    labels = range(int(train.labels_N.max()) + 1)
    return [np.stack([scores(label, c) for label in labels]).argmax(axis=0) for c in (0.3, 1.0)]


def log_count_ratios(sets: Any, is_class_N: np.ndarray) -> np.ndarray:
    """Return the log-count ratio of each feature, with a smoothing of 1."""
    own, others = (1 + np.asarray(sets[chosen].sum(axis=0))[0] for chosen in (is_class_N, ~is_class_N))
    ratios: np.ndarray = np.log(own / own.sum()) - np.log(others / others.sum())
    return ratios


def lexicon_sums(texts: list[str]) -> np.ndarray:
    """Return the sums of the positive and of the negative ratings of each text's words, [N, 2]."""
    ratings = {word.lower(): rating for word, rating in rated_words(lexicon_file(), "latin-1")}
    found = [[ratings.get(word, 0.0) for word in re.findall(WORDS, text.lower())] for text in texts]
    return np.array([[sum(max(r, 0) for r in text), sum(min(r, 0) for r in text)] for text in found], dtype=np.float64)


def texts_of(store: TextStore) -> list[str]:
    """Return all texts of a split."""
    return [store.text(number) for number in range(store.num_texts)]


MODELS = {
    "TF-IDF": tfidf,
    "NBSVM": partial(nbsvm, with_lexicon=False),
}
"""What is measured of all sets."""
RATED = {"NBSVM and lexicon": partial(nbsvm, with_lexicon=True)}
"""What is measured of a set whose recipe has a lexicon."""

if __name__ == "__main__":
    main(sys.argv[1:])
