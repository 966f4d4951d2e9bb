import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config.schema import DataConfig
from moe_train.data.sources import open_source
from moe_train.data.sources.text import cut_txt
from moe_train.errors import DataError


def read(path, **fields):
    return [document.text for document in open_source(DataConfig(source="text", path=str(path), **fields)).documents()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(text=st.text(alphabet="aé€𝄞 \n\r", max_size=400), repeat=st.sampled_from([1, 200, 2000]))
def test_pieces_join_to_the_file(tmp_path, text, repeat):
    path = tmp_path / "a.txt"
    path.write_bytes((text * repeat).encode())
    pieces = list(cut_txt(path))
    assert "".join(pieces) == text * repeat
    assert all(pieces)


def test_a_file_is_cut_at_blank_lines(tmp_path):
    paragraph = "word " * 200 + "\n\n"
    path = tmp_path / "a.txt"
    path.write_text(paragraph * 2000, encoding="utf-8")
    pieces = read(path)
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert all(16 * 1024 <= len(piece) < 16 * 1024 + len(paragraph) for piece in pieces[:-1])


def test_a_small_file_has_enough_documents_to_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A short paragraph of text.\n\n" * 100, encoding="utf-8")
    assert 20 <= len(read(path)) <= 40


def test_one_endless_line_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é" * 1_000_000, encoding="utf-8")
    pieces = read(path)
    assert max(len(piece.encode()) for piece in pieces) <= 9 * 16 * 1024


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt") == ["hello"]


def test_folder_is_searched_in_order(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "two.txt").write_text("2")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "z.jsonl").write_text('{"text": "3"}\n\n{"text": "", "other": 1}\n{"text": "4"}')
    (tmp_path / "ignored.pdf").write_text("no")
    assert read(tmp_path) == ["1", "2", "3", "4"]
    assert read(tmp_path / "**" / "*.txt") == ["1", "2"]


def test_field_of_a_json_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "b", "text": "t"}))
    assert read(tmp_path, text_field="body") == ["b"]


@pytest.mark.parametrize("position", [0, 7, 20_000, 40_000])
def test_bytes_that_are_not_utf8_are_located(tmp_path, position):
    content = bytearray(b"0123456\n\n" * 6000)
    content[position] = 0xFF
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.txt: byte {position} is not UTF-8"):
        read(tmp_path)


def test_a_character_cut_off_by_the_end_of_file_is_located(tmp_path):
    (tmp_path / "bad.txt").write_bytes("abc€".encode()[:-1])
    with pytest.raises(DataError, match="byte 3 is not UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x", "id": 3}', "its fields are body, id"),
        (b'{"text": 3}', "no text in the field text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_json_line_is_located(tmp_path, line, rule):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{rule}"):
        read(tmp_path)


def test_all_bad_files_are_reported_together(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.jsonl").write_bytes(b"{")
    (tmp_path / "c.txt").write_bytes(b"good")
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert len(caught.value.problems) == 2


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(DataError, match="empty folder"):
        read(tmp_path)
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.txt")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"no file that ends in \.txt, \.jsonl"):
        read(tmp_path)


def test_identity_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = open_source(DataConfig(source="text", path=str(path)))
    before = source.identity()
    assert source.identity() == before
    os.utime(path, ns=(1, 1))
    assert source.identity() != before
