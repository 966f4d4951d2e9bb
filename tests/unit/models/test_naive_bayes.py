"""Naive Bayes features against loops over sets of runs, a worked example, and what they never depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_classifier import bayes_scores, run_rows
from torch import Tensor

from moe_train.config.classifier import NaiveBayesConfig
from moe_train.models.naive_bayes import NaiveBayes, distinct_rows, log_count_ratios

CONFIG = NaiveBayesConfig(longest=3, rows=23, scale=0.5)
TEXTS = st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=5)


def batch_of(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Texts, filled up with a token like others."""
    tokens_BS = torch.full((len(texts), length), 3)
    for place, text in enumerate(texts):
        tokens_BS[place, : len(text)] = torch.tensor(text, dtype=torch.int64)
    return tokens_BS, torch.arange(length) < torch.tensor([len(text) for text in texts]).unsqueeze(1)


def features(config: NaiveBayesConfig, num_classes: int) -> NaiveBayes:
    layer, generator = NaiveBayes(config, num_classes).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight_NC.normal_(generator=generator)
        layer.ratios_NC.normal_(generator=generator)
    return layer


@given(TEXTS, st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_row_of_a_text_counts_once_and_none_of_its_padding(texts: list[list[int]], longest: int, pad: int) -> None:
    config = CONFIG.model_copy(update={"longest": longest})
    rows_BR, counts_BR = distinct_rows(*batch_of(texts, max(map(len, texts)) + pad), config)
    found = [rows_R[counts_R].tolist() for rows_R, counts_R in zip(rows_BR, counts_BR, strict=True)]
    assert found == [sorted(run_rows(text, longest, config.rows)) for text in texts]


@given(TEXTS)
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_loops(texts: list[list[int]]) -> None:
    layer = features(CONFIG, 3)
    found_BC = layer(*batch_of(texts, 7))
    expected = [bayes_scores(CONFIG, layer.weight_NC, layer.ratios_NC, text) for text in texts]
    torch.testing.assert_close(found_BC, torch.stack(expected))


@given(TEXTS, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_ratios_are_those_of_counted_sets_in_batches_of_any_size(texts: list[list[int]], size: int) -> None:
    classes, layer = [number % 3 for number in range(len(texts))], NaiveBayes(CONFIG, 3).double()
    parts = [range(first, min(first + size, len(texts))) for first in range(0, len(texts), size)]
    layer.fill_ratios(
        (*batch_of([texts[n] for n in part], 8), torch.tensor([classes[n] for n in part])) for part in parts
    )
    counts = [[0.0] * 3 for _ in range(CONFIG.rows)]
    for text, label in zip(texts, classes, strict=True):
        for row in run_rows(text, CONFIG.longest, CONFIG.rows):
            counts[row][label] += 1
    for row, per_class in enumerate(counts):
        for label, value in enumerate(per_class):
            assert layer.ratios_NC[row, label].item() == pytest.approx(ratio(counts, row, label), abs=1e-12), value


def ratio(counts: list[list[float]], row: int, label: int) -> float:
    """Wang and Manning 2012, section 2.2, with α = 1."""
    if not any(counts[row]):
        return 0.0
    own = [1 + per_class[label] for per_class in counts if any(per_class)]
    others = [1 + sum(per_class) - per_class[label] for per_class in counts if any(per_class)]
    p, q = 1 + counts[row][label], 1 + sum(counts[row]) - counts[row][label]
    return math.log(p / sum(own)) - math.log(q / sum(others))


def test_the_ratio_of_a_small_example() -> None:
    """Three texts of each class: "good" in three and one of them, "film" in all, "fog" in none."""
    good, film, fog = log_count_ratios(torch.tensor([[3, 1], [3, 3], [0, 0]]), smoothing=1.0).tolist()
    assert good == pytest.approx([math.log((4 / 8) / (2 / 6)), math.log((2 / 6) / (4 / 8))])
    assert film == pytest.approx([math.log((4 / 8) / (4 / 6)), math.log((4 / 6) / (4 / 8))])
    assert fog == [0.0, 0.0]


def test_a_run_of_no_training_text_says_nothing_whatever_its_weight() -> None:
    layer = features(NaiveBayesConfig(longest=1, rows=10**6), 2)
    tokens_BS, valid_BS = batch_of([[5], [6]], 1)
    layer.fill_ratios([(tokens_BS, valid_BS, torch.tensor([0, 1]))])
    known_BC, unknown_BC = (layer(*batch_of([[token]], 1)) for token in (5, 7))
    assert known_BC.abs().min() > 0 and not unknown_BC.any()
