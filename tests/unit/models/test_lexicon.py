"""Scores of rated words against loops, and what they never depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_classifier import lexicon_scores, run_hash
from torch import Tensor

from moe_train.config.classifier import LexiconConfig
from moe_train.models.lexicon import NO_RUN, Lexicon, hash_of

LONGEST = 3
RUNS = st.lists(st.integers(0, 4), min_size=1, max_size=LONGEST).map(tuple)
RATINGS = st.dictionaries(RUNS, st.sampled_from([-3.0, -0.5, 0.0, 1.0, 2.5]), max_size=12)
TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=5)


def lexicon_of(ratings: dict[tuple[int, ...], float], rows: int = 12) -> Lexicon:
    layer = Lexicon(LexiconConfig(longest=LONGEST, rows=rows, scale=0.5), 3).double()
    layer.weight_NC.data.normal_(generator=torch.Generator().manual_seed(0))
    layer.fill(ratings)
    return layer


def batch_of(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Texts, filled up with a token like others."""
    tokens_BS = torch.full((len(texts), length), 3)
    for place, text in enumerate(texts):
        tokens_BS[place, : len(text)] = torch.tensor(text, dtype=torch.int64)
    return tokens_BS, torch.arange(length) < torch.tensor([len(text) for text in texts]).unsqueeze(1)


@given(RATINGS, TEXTS, st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_scores_are_those_of_loops(ratings: dict[tuple[int, ...], float], texts: list[list[int]], pad: int) -> None:
    layer = lexicon_of(ratings)
    found_BC = layer(*batch_of(texts, max(map(len, texts)) + pad))
    hashed = {run_hash(list(run)): rating for run, rating in ratings.items()}
    expected = [lexicon_scores(layer.config, layer.weight_NC, hashed, text) for text in texts]
    torch.testing.assert_close(found_BC, torch.stack(expected))


@given(RUNS)
def test_the_hash_of_a_run_is_that_of_the_loop_and_comes_before_no_run(run: tuple[int, ...]) -> None:
    assert hash_of(run) == run_hash(list(run)) < NO_RUN


def test_the_longest_word_that_begins_at_a_token_counts() -> None:
    layer = lexicon_of({(1,): -1.0, (1, 2): 2.0, (2,): -3.0, (2, 4, 4): 1.0})
    ratings_BS = layer.ratings(*batch_of([[1, 2, 4, 4], [1, 4, 2, 4]], 4))
    assert ratings_BS.tolist() == [[2.0, 1.0, 0.0, 0.0], [-1.0, 0.0, -3.0, 0.0]]


def test_praise_and_blame_are_summed_apart() -> None:
    """Else a text of as much praise as blame would be one without either."""
    layer = lexicon_of({(1,): 2.0, (2,): -2.0})
    both_C, none_C = layer(*batch_of([[1, 2], [0, 0]], 2))
    torch.testing.assert_close(both_C, 0.5 * (2 * layer.weight_NC[0] - 2 * layer.weight_NC[1]))
    assert both_C.abs().min() > 0 and not none_C.any()


def test_words_go_when_others_are_filled_in() -> None:
    layer = lexicon_of({(1,): 2.0, (2,): -2.0})
    layer.fill({(3,): 1.0})
    assert layer.ratings(*batch_of([[1, 2, 3]], 3)).tolist() == [[0.0, 0.0, 1.0]]
    layer.fill({})
    assert not layer.ratings(*batch_of([[1, 2, 3]], 3)).any()


def test_more_words_than_rows_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        lexicon_of({(1,): 2.0, (2,): -2.0}, rows=1)


def test_gradients_reach_the_weights_alone() -> None:
    layer = lexicon_of({(1,): 2.0})
    layer(*batch_of([[1, 1, 0]], 3))[:, 0].sum().backward()
    assert layer.weight_NC.grad.tolist() == [[0.5 * 4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
