"""The facts of the sets that scripts/setup.sh installs."""

import functools
from collections import Counter

import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.labelled.collect import collect
from moe_train.data.labelled.sources import open_labelled_source
from moe_train.data.labelled.sources.vader import KINDS, class_of, rating_files
from moe_train.data.labelled.split import letters, shared_texts, split_order, stratified
from moe_train.data.progress import no_progress
from moe_train.errors import DataError


@functools.cache
def read(name):
    """The examples and the collection of a set."""
    source = open_labelled_source(DataConfig(source=name))
    return list(source.examples()), collect(source, None, no_progress)


def test_vader_has_the_known_numbers():
    examples, found = read("vader")
    assert Counter(e.label for e in examples) == {"negative": 7349, "neutral": 7854, "positive": 8500}
    assert found.classes == ("negative", "neutral", "positive")
    assert len(examples) == found.examples == 23_703
    assert len(found.texts) == 23_619
    assert found.conflicts == 12
    assert any("<3" in text for text in found.texts), "written as &lt;3"
    label = dict(zip(found.texts, found.labels_N.tolist(), strict=True))
    assert label["Yay. Another good phone interview."] == 2
    assert label["troubleshooting ad-2500 and ad-2600 no picture scrolling b/w."] == 1


@pytest.mark.parametrize(
    ("rating", "name"),
    [(-4, "negative"), (-1, "negative"), (-0.99, "neutral"), (0, "neutral"), (0.99, "neutral"), (1, "positive")],
)
def test_ratings_from_one_on_have_a_direction(rating, name):
    assert class_of(rating) == name


def test_rotten_tomatoes_has_the_known_numbers():
    examples, found = read("rotten_tomatoes")
    assert len(found.texts) == 8530 and found.conflicts == 0
    assert len({letters(text) for text in found.texts}) == 8528
    assert Counter(e.label for e in examples) == {"negative": 4265, "positive": 4265}
    label = dict(zip(found.texts, found.labels_N.tolist(), strict=True))
    (masterpiece,) = (label[text] for text in label if text.startswith("the gorgeously elaborate continuation of"))
    assert masterpiece == 1


@pytest.mark.slow  # reads 25,000 reviews
def test_imdb_has_the_known_numbers():
    examples, found = read("imdb")
    assert Counter(e.label for e in examples) == {"negative": 12_500, "positive": 12_500}
    assert len(found.texts) == 24_903 and found.conflicts == 0
    assert not any("<br />" in text for text in found.texts)
    mentions = Counter(
        number for text, number in zip(found.texts, found.labels_N.tolist(), strict=True) if "worst" in text
    )
    assert mentions[0] > 5 * mentions[1]


def test_rotten_tomatoes_is_nearly_all_in_vader():
    """Whoever trains on one and tests on the other, tests on what was learnt."""
    films = [example.text for example in read("vader")[0] if example.place.startswith("movie")]
    assert shared_texts(read("rotten_tomatoes")[1].texts, films) == 8483


@pytest.mark.slow  # reads 25,000 reviews
@pytest.mark.parametrize("name", ["vader", "rotten_tomatoes"])
def test_reviews_of_imdb_are_a_fair_start_for_short_texts(name):
    assert shared_texts(read("imdb")[1].texts, read(name)[1].texts) == 0


@pytest.mark.parametrize("name", ["vader", "rotten_tomatoes", pytest.param("imdb", marks=pytest.mark.slow)])
def test_no_near_copy_of_a_heldout_text_is_learnt(name):
    found = read(name)[1]
    order_N = split_order(found.texts, 0)
    heldout_N = stratified(found.labels_N[order_N], found.classes, 0.1)
    train, heldout = ([found.texts[n] for n in order_N[side].tolist()] for side in (~heldout_N, heldout_N))
    assert abs(len(heldout) - 0.1 * len(found.texts)) <= 1.5
    assert shared_texts(train, heldout) == 0


def test_missing_ratings_name_the_command(tmp_path):
    (tmp_path / f"{KINDS[0]}_GroundTruth.txt").touch()
    with pytest.raises(DataError) as caught:
        rating_files(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: does not hold movieReviewSnippets_GroundTruth.txt, nytEditorialSnippets_GroundTruth.txt, "
        "tweets_GroundTruth.txt; fetch the ratings, as scripts/setup.sh does: python scripts/fetch_vader.py"
    )


def test_identity_is_found_without_reading():
    assert open_labelled_source(DataConfig(source="vader")).identity() == {
        "package": "vaderSentiment",
        "version": "0.5",
    }
    names = ("rotten_tomatoes", "imdb")
    assert len({str(open_labelled_source(DataConfig(source=name)).identity()) for name in names}) == 2
