import datasets
import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.labelled.sources import open_labelled_source
from moe_train.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("huggingface"))
    datasets.disable_progress_bars()


def source_of(path, **fields):
    return open_labelled_source(DataConfig(source="huggingface", path=str(path), **fields))


def write(path, texts, labels, names=None):
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    if names:
        rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    rows.to_parquet(str(path))


def test_names_of_a_class_label(tmp_path):
    write(tmp_path / "a.parquet", [" one", "two", ""], [1, 0, 1], ["bad", "good"])
    source = source_of(tmp_path / "a.parquet")
    assert source.classes() == ("bad", "good")
    assert [(e.text, e.label) for e in source.examples()] == [("one", "good"), ("two", "bad"), ("", "good")]


def test_words_and_numbers(tmp_path):
    write(tmp_path / "a.parquet", ["one", "two"], [3, 4])
    source = source_of(tmp_path / "a.parquet")
    assert source.classes() is None
    assert [e.label for e in source.examples()] == ["3", "4"]


def test_rows_without_text_or_class(tmp_path):
    write(tmp_path / "a.parquet", ["one", None, "three", None], [0, 1, -1, None], ["bad", "good"])
    with pytest.raises(DataError) as caught:
        list(source_of(tmp_path / "a.parquet").examples())
    assert [str(problem).partition(";")[0] for problem in caught.value.problems] == [
        "row 1: the column text holds NoneType, not text",
        "row 2: the column label holds -1, which is no class",
        "row 3: the column text holds NoneType, not text",
        "row 3: the column label holds None, which is no class",
    ]


def test_both_missing_columns_are_told_at_once(tmp_path):
    write(tmp_path / "a.parquet", ["one"], [0])
    with pytest.raises(DataError) as caught:
        source_of(tmp_path / "a.parquet", text_field="body", label_field="stars").identity()
    assert [problem.key for problem in caught.value.problems] == ["data.text_field", "data.label_field"]
    assert "there are text, label" in str(caught.value)


def test_identity_follows_rows_and_columns(tmp_path):
    write(tmp_path / "a.parquet", ["one"], [0])
    write(tmp_path / "b.parquet", ["two"], [0])
    first = source_of(tmp_path / "a.parquet").identity()
    assert first == source_of(tmp_path / "a.parquet").identity()
    assert first != source_of(tmp_path / "b.parquet").identity()
    assert first != source_of(tmp_path / "a.parquet", label_field="text").identity()
