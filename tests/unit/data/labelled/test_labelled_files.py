import json

import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.labelled.collect import MOST_SHOWN, collect
from moe_train.data.labelled.sources import Example, open_labelled_source
from moe_train.data.progress import no_progress
from moe_train.errors import DataError


def source_of(path, **fields):
    return open_labelled_source(DataConfig(source="text", path=str(path), **fields))


def examples_of(path, **fields):
    return [(example.text, example.label) for example in source_of(path, **fields).examples()]


def problems_of(path, **fields):
    with pytest.raises(DataError) as caught:
        examples_of(path, **fields)
    return [str(problem) for problem in caught.value.problems]


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbflabel,id,text\r\ngood,1,"It was ""fine"",\r\nreally"\r\n bad ,2,  Ugh \r\n1,3,caf\xc3\xa9\r\n'
    )
    path = tmp_path / "a.csv"
    assert list(source_of(path).examples()) == [
        Example('It was "fine",\r\nreally', "good", f"{path}, line 3"),
        Example("Ugh", "bad", f"{path}, line 4"),
        Example("café", "1", f"{path}, line 5"),
    ]


def test_json_lines(tmp_path):
    rows = [{"text": " a ", "label": 0}, {"text": "b", "label": "x"}, {"text": "c", "label": True}]
    lines = [json.dumps(row) for row in [*rows, {"text": "d", "label": 2.0}]]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert examples_of(tmp_path / "a.jsonl") == [("a", "0"), ("b", "x"), ("c", "true"), ("d", "2")]


def test_labels_of_pandas_are_whole_numbers(tmp_path):
    """A column of numbers with a gap is written with fractions."""
    (tmp_path / "a.csv").write_text("text,label\na,1.0\nb,-2.00\nc,0.5\nd,v1.0\n")
    assert [label for _, label in examples_of(tmp_path / "a.csv")] == ["1", "-2", "0.5", "v1.0"]


def test_folder_of_both_with_other_fields(tmp_path):
    (tmp_path / "a.csv").write_text("body,stars\none,5\n")
    (tmp_path / "b.jsonl").write_text('{"body": "two", "stars": 1}\n')
    (tmp_path / "c.txt").write_text("no labels here")
    fields = {"text_field": "body", "label_field": "stars"}
    assert examples_of(tmp_path, **fields) == [("one", "5"), ("two", "1")]


def test_all_bad_rows_of_all_files_are_told_at_once(tmp_path):
    a, b, c, d = (tmp_path / name for name in ("a.csv", "b.jsonl", "c.csv", "d.csv"))
    a.write_bytes(b"text,label\nfine,good\nno label,\nbytes \xff,good\nunquoted, comma,good\nfine,bad\n")
    b.write_text(
        '{"text": 7, "label": "good"}\n[1]\n{"text": "fine", "label": "bad"}\n{"text": "x", "label": 0.5}\nnot json\n'
    )
    c.write_text("words,class\nfine,good\n")
    d.write_text('text,label\n"never closed,good\n')
    problems = problems_of(tmp_path)
    expected = [
        (f"{a}, line 3: ", "has no class in the field label; its fields are text, label"),
        (f"{a}, line 4: ", "holds bytes that are not UTF-8"),
        (f"{a}, line 5: ", "has 1 more fields than the heading; put texts that contain commas into double quotes"),
        (f"{b}, line 1: ", "has no text in the field text"),
        (f"{b}, line 2: ", "is not a JSON object"),
        (f"{b}, line 4: ", "has no class in the field label"),
        (f"{b}, line 5: ", "is not JSON"),
        ("data.text_field=text: ", f"{c} has no such column; its columns are words, class"),
        ("data.label_field=label: ", f"{c} has no such column; its columns are words, class"),
        (f"{d}, line 2: ", "is not CSV: unexpected end of data"),
    ]
    assert len(problems) == len(expected)
    for found, (place, rule) in zip(sorted(problems), sorted(expected), strict=True):
        assert found.startswith(place + rule)


def test_a_file_of_bad_rows_does_not_fill_the_screen(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "x,\n" * 1000)
    with pytest.raises(DataError) as caught:
        collect(source_of(tmp_path / "a.csv"), None, no_progress)
    assert len(caught.value.problems) == MOST_SHOWN + 1
    assert str(caught.value.problems[-1]) == "data: 980 more rows are like these; mend or remove them, too"


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800", "label": "x"}\n')
    assert "half of a surrogate pair" in problems_of(tmp_path / "a.jsonl")[0]


def test_file_without_rows_or_heading(tmp_path):
    (tmp_path / "a.csv").write_text("")
    assert "its columns are none" in problems_of(tmp_path / "a.csv")[0]


def test_plain_text_has_no_labels(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert problems_of(tmp_path) == [
        f"data.path={tmp_path}: has no file that ends in .csv, .jsonl among 1; convert the files or name others"
    ]


def test_identity_follows_files_and_fields(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    first = source_of(tmp_path).identity()
    assert first == source_of(tmp_path).identity()
    assert first != source_of(tmp_path, label_field="other").identity()
    (tmp_path / "a.csv").write_text("text,label\na,b\nc,d\n")
    assert first != source_of(tmp_path).identity()
