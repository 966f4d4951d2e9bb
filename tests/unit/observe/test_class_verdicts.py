"""Figures of classifiers against numbers from the formulas by hand, and the words about collapse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.observe.classes import Verdicts, collapse_words, collapses
from moe_train.observe.records import attending, feed_forward, layer_title

CONFUSION = [[5, 1, 0], [2, 2, 2], [0, 1, 7]]
square = st.integers(1, 5).flatmap(
    lambda c: st.lists(st.lists(st.integers(0, 9), min_size=c, max_size=c), min_size=c, max_size=c)
)


def test_golden_numbers() -> None:
    """Precision 5/7, 2/4, 7/9 and recall 5/6, 2/6, 7/8; F1 = 2PR / (P + R) = 10/13, 4/10, 14/17."""
    found = Verdicts.of(CONFUSION)
    assert found.accuracy == 14 / 20 and found.majority == 8 / 20
    assert found.precision == pytest.approx((5 / 7, 1 / 2, 7 / 9), rel=1e-15)
    assert found.recall == pytest.approx((5 / 6, 1 / 3, 7 / 8), rel=1e-15)
    assert found.macro_f1 == pytest.approx((10 / 13 + 4 / 10 + 14 / 17) / 3, rel=1e-15)


def test_a_class_that_is_never_told_has_no_f1() -> None:
    """Always telling the first of two classes: the accuracy is its share, macro-F1 half of its own F1."""
    found = Verdicts.of([[6, 0], [4, 0]])
    assert (found.accuracy, found.majority, found.precision, found.recall) == (0.6, 0.6, (0.6, 0.0), (1.0, 0.0))
    assert found.macro_f1 == pytest.approx(0.75 / 2, rel=1e-15)


@given(square.filter(lambda rows: sum(map(sum, rows)) > 0))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(confusion: list[list[int]]) -> None:
    found = Verdicts.of(confusion)
    pairs = zip(found.precision, found.recall, strict=True)
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs]
    assert found.macro_f1 == pytest.approx(sum(f1) / len(f1), rel=1e-12, abs=1e-15)
    right = [len(confusion) * [0] for _ in confusion]
    for place, row in enumerate(confusion):
        right[place][place] = sum(row)
    assert Verdicts.of(right).accuracy == 1.0 and Verdicts.of(right).majority == found.majority


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([0.5, 0.0, 0.49, 0.01], "experts 1 and 3 are unused"),
        ([0.4, 0.3, 0.3, 0.0], "expert 3 is unused"),
        ([0.92, 0.03, 0.05], "expert 0 is the first choice of 92%"),
        ([1 / 3, 1 / 3, 1 / 3, 0.0], "expert 3 is unused"),
        ([0.99, 0.01, 0.0], "expert 0 is the first choice of 99% and experts 1 and 2 are unused"),
    ],
)
def test_collapse_is_said_in_words(shares: list[float], words: str) -> None:
    sentence = collapse_words(shares, shares, "head")
    assert sentence.startswith(f"head: {words}") and "the router has collapsed" in sentence
    assert "model.ffn.balance.aux" in sentence


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.026, 0.324, 0.3, 0.35], [0.9, 0.1], [1.0]])
def test_no_collapse_where_every_expert_is_used(shares: list[float]) -> None:
    """The bounds: a tenth of an even share, and nine tenths for one; a single expert cannot collapse."""
    assert "every expert is used" in collapse_words(shares, shares, "layer 1")


def test_second_choices_are_use() -> None:
    """A small head with its balance loss at work: two experts never come first, and do a third of the work."""
    sentence = collapse_words([0.33, 0.0, 0.0, 0.67], [0.27, 0.23, 0.12, 0.38], "head")
    assert sentence == (
        "head: every expert is used, but experts 1 and 2 are hardly ever the first choice (with 35% of all choices)."
    )


def test_each_layer_of_a_record_is_judged() -> None:
    shares = {"layer_00": [1.0, 0.0], "layer_02_head": [0.5, 0.5]}
    record = {f"moe/{layer}/{name}": told for layer, told in shares.items() for name in ("utilisation", "load")}
    sentences = list(collapses(record))
    assert sentences[0].startswith("layer 0: expert 0") and sentences[1].startswith("head: every expert is used")
    for unknown in ([None, 0.5], None, [0.0, 0.0], "?"):
        (told,) = collapses({**record, "moe/layer_00/utilisation": unknown})
        assert told.startswith("head"), "what is unknown is not judged"
    assert list(collapses({"moe/layer_00/utilisation": [0.5, 0.5]})) == [], "nothing is known of all choices"


def test_a_head_stands_with_the_feed_forward_layers() -> None:
    layers = ["layer_00", "layer_00_values", "layer_02_head"]
    assert feed_forward(layers) == ["layer_00", "layer_02_head"] and attending(layers) == ["layer_00_values"]
    assert layer_title("layer_02_head") == "head"
