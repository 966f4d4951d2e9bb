"""What a linear model of words and pairs of words reaches on the held-out texts of the sentiment study.

Usage: python scripts/tfidf_baseline.py vader rotten_tomatoes imdb        (needs: pip install scikit-learn)

TF-IDF of runs of one and two words and logistic regression; of each split the better of two strengths of
regularisation, C = 1 and 10, so that the comparison errs in its favour.
"""

from __future__ import annotations

import statistics
import sys

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.labelled.corpus import open_labelled
from moe_train.data.labelled.store import TextStore

HELDOUT = 0.1
SPLITS = (0, 1, 2)
STRENGTHS = (1.0, 10.0)


def main(sources: list[str]) -> None:
    """Print a line per set of texts."""
    for source in sources:
        found = [accuracy(source, split) for split in SPLITS]
        each = ", ".join(f"{value:.4f}" for value in found)
        print(f"{source}: {statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} ({each})", flush=True)


def accuracy(source: str, split_seed: int) -> float:
    """Return the held-out accuracy on a set's texts, on the split that a run with this seed has."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = DataConfig.model_validate({"source": source, "heldout_fraction": HELDOUT, "split_seed": split_seed})
    corpus = open_labelled(data, TokenizerConfig(kind="bytes"), SentimentTask(), lambda work: work())
    vectors = TfidfVectorizer(ngram_range=(1, 2))
    train = vectors.fit_transform(texts_of(corpus.train))
    heldout = vectors.transform(texts_of(corpus.heldout))
    models = [LogisticRegression(C=c, max_iter=500).fit(train, corpus.train.labels_N) for c in STRENGTHS]
    return max(float((model.predict(heldout) == corpus.heldout.labels_N).mean()) for model in models)


def texts_of(store: TextStore) -> list[str]:
    """Return all texts of a split."""
    return [store.text(number) for number in range(store.num_texts)]


if __name__ == "__main__":
    main(sys.argv[1:])
