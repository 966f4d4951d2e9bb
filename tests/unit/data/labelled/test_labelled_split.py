import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.labelled.split import letters, shared_texts, split_hashes, split_order, stratified
from moe_train.errors import DataError


@given(sizes=st.lists(st.integers(5, 60), min_size=1, max_size=4), fraction=st.floats(0, 0.8), order=st.randoms())
def test_each_class_gives_its_share_rounded_and_its_first_texts(sizes, fraction, order):
    labels = [number for number, size in enumerate(sizes) for _ in range(size)]
    order.shuffle(labels)
    labels_N = np.array(labels)
    heldout_N = stratified(labels_N, [str(number) for number in range(len(sizes))], fraction)
    for number, size in enumerate(sizes):
        own = heldout_N[labels_N == number].tolist()
        count = sum(own)
        assert abs(count - fraction * size) <= 0.5
        assert own == [True] * count + [False] * (size - count)


def test_a_class_without_a_training_text_is_refused_and_all_are_named():
    labels_N = np.array([0, 1, 1, 1, 1, 2])
    with pytest.raises(DataError) as caught:
        stratified(labels_N, ["rare", "common", "single"], 0.5)
    assert [str(problem)[:83] for problem in caught.value.problems] == [
        "data.heldout_fraction=0.5: leaves nothing to train on of the 1 texts of class rare;",
        "data.heldout_fraction=0.5: leaves nothing to train on of the 1 texts of class singl",
    ]


def test_the_order_depends_on_seed_and_texts_alone():
    texts = [f"text {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(200)]
    order = [texts[n] for n in split_order(texts, 3)]
    assert order == [texts[::-1][n] for n in split_order(texts[::-1], 3)]
    assert sorted(order) == sorted(texts) != order
    other = [texts[n] for n in split_order(texts, 4)]
    assert len(set(order[:100]) & set(other[:100])) in range(30, 71), "half of the first texts by chance"


def test_near_copies_have_one_hash():
    hashes = split_hashes(["It's fine.", "its  FINE !", "it was fine", "7/10", "8/10", "Ήταν ΩΡΑΙΑ", "ήταν ωραια"], 0)
    assert hashes[0] == hashes[1] and hashes[5] == hashes[6]
    assert len(set(hashes.tolist())) == 5, "texts without letters are told apart by their signs"


def test_letters():
    assert letters("The Rock's 21st, 'new'!") == "therocksstnew"
    assert letters("Çok güzel_1") == "çokgüzel"
    assert letters(":-) 10/10") == ":-) 10/10"


def test_shared_texts_are_counted_once():
    assert shared_texts(["A b.", "a B", "c"], ["ab!", "d", "AB"]) == 1
    assert shared_texts(["a"], []) == 0
