import os

import pytest

from moe_train.observe.files import write_atomically


def test_it_makes_the_folder_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with path.open() as reader:
        write_atomically(path, "new, and longer")
        assert reader.read() == "old"
    assert path.read_text() == "new, and longer"


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer")  # what was left behind does not disturb
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]
