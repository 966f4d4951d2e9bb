import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.sources import open_source
from moe_train.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("huggingface"))
    datasets.disable_progress_bars()


def source_of(path, **fields):
    return open_source(DataConfig(source="huggingface", path=str(path), **fields))


def texts_of(path, **fields):
    documents = list(source_of(path, **fields).documents())
    assert {document.domain for document in documents} == {"huggingface"}
    return [document.text for document in documents]


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)


def test_parquet_file(tmp_path):
    texts = [f"row {number}" for number in range(2500)]
    write_parquet(tmp_path / "a.parquet", texts)
    assert texts_of(tmp_path / "a.parquet") == texts


def test_glob_of_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    assert texts_of(tmp_path / "*.jsonl") == ["one", "two"]


def test_csv_with_another_column(tmp_path):
    (tmp_path / "a.csv").write_text("body,label\nhello,1\n")
    assert texts_of(tmp_path / "a.csv", text_field="body") == ["hello"]


def test_folder_with_splits(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", ["a"])
    write_parquet(tmp_path / "test-0.parquet", ["b"])
    assert texts_of(tmp_path) == ["a"]
    assert texts_of(tmp_path, split="test") == ["b"]


def test_missing_split_lists_what_there_is(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match=r"data\.split=nothing: .*train"):
        texts_of(tmp_path, split="nothing")


def test_missing_column_lists_what_there_is(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"], column="body")
    with pytest.raises(DataError, match=r"data\.text_field=text: no such column; there are body, id"):
        texts_of(tmp_path)


def test_column_that_is_not_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(DataError, match="row 0: the column id holds int"):
        texts_of(tmp_path, text_field="id")


def test_missing_and_mixed_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        texts_of(tmp_path / "none.parquet")
    write_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(DataError, match="several formats: json, parquet"):
        texts_of(tmp_path)


def test_unknown_data_set_is_a_data_error():
    with pytest.raises(DataError, match="cannot be loaded"):
        texts_of("no-one/no-such-data-set")


def test_damaged_file_is_a_data_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be loaded"):
        texts_of(tmp_path / "a.parquet")


def test_code_of_a_data_set_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    write_parquet(folder / "a.parquet", ["a"])
    with pytest.raises(DataError, match="scripts are no longer supported"):
        texts_of(folder)
    assert not canary.exists()


def test_identity_follows_the_files(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["a"])
    first = source_of(path).identity()
    assert source_of(path).identity() == first
    write_parquet(path, ["b"])
    os.utime(path, ns=(10**18, 10**18))
    assert source_of(path).identity() != first
