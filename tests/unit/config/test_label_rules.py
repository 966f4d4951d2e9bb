import pytest

from moe_train.config.label_rules import LABELS_ONLY, WITHOUT_LABELS, label_problems
from moe_train.config.schema import DataConfig, MixPart, PrepareConfig
from moe_train.config.task import LanguageTask, SentimentTask
from moe_train.data.labelled.sources import LABELLED_SOURCES
from moe_train.data.sources import SOURCES
from moe_train.prepare import rules


def keys(data, task):
    return [problem.key for problem in label_problems(data, task)]


@pytest.mark.parametrize("source", LABELLED_SOURCES)
def test_sources_with_labels_are_for_classes(source):
    assert keys(DataConfig(source=source, path="x"), SentimentTask()) == []


@pytest.mark.parametrize("source", WITHOUT_LABELS)
def test_sources_without_labels_are_not(source):
    assert keys(DataConfig(source=source), SentimentTask()) == ["data.source"]
    assert keys(DataConfig(source=source), LanguageTask()) == []


@pytest.mark.parametrize("source", LABELS_ONLY)
def test_labelled_sentences_are_no_text_to_learn_a_language_from(source):
    assert keys(DataConfig(source=source), LanguageTask()) == ["data.source"]
    mix = DataConfig(source="mix", parts={"films": MixPart(source=source), "plays": MixPart()})
    assert keys(mix, LanguageTask()) == ["data.parts.films.source"]
    assert [p.key for p in rules(PrepareConfig(data=DataConfig(source=source)))] == ["data.source"]


def test_every_source_is_in_one_of_the_lists():
    names = set(DataConfig.model_fields["source"].annotation.__args__)
    assert set(LABELLED_SOURCES) | set(WITHOUT_LABELS) == names
    assert set(SOURCES) | {"mix", "tokens"} | set(LABELS_ONLY) == names


@pytest.mark.parametrize(
    ("classes", "rules"),
    [
        (("a", "b"), []),
        (None, []),
        ((), ["there is nothing to tell apart"]),
        (("a", "a"), ["names a class twice"]),
        (("a", " b"), ["has a name that is empty, or with white space at an end"]),
        (("",), ["there is nothing to tell apart", "has a name that is empty, or with white space at an end"]),
    ],
)
def test_names_of_classes(classes, rules):
    found = label_problems(DataConfig(source="imdb"), SentimentTask(classes=classes))
    assert [problem.rule for problem in found] == rules


def test_one_field_cannot_be_both():
    assert keys(DataConfig(source="text", path="x", label_field="text"), SentimentTask()) == ["data.label_field"]


def test_all_problems_are_told_at_once():
    data = DataConfig(label_field="text")
    assert keys(data, SentimentTask(classes=("a", "a"))) == ["task.classes", "data.source", "data.label_field"]
