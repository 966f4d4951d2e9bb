"""manifest.json: any altered byte is noticed, in itself and in what it lists."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.checkpoint.manifest import Manifest, damage_of, read_manifest, record_of
from moe_train.errors import CheckpointError

FILES = {name: {"size_bytes": 3, "sha256": "ab" * 32} for name in (".metadata", "trainer.json", "__0_0.distcp")}
MANIFEST = Manifest.model_validate({"format": 1, "step": 50, "world_size": 4, "ep": 2, "files": FILES})
TEXT = MANIFEST.render()


def test_what_is_rendered_is_json_and_parses_to_the_same() -> None:
    assert json.loads(TEXT)["manifest"]["step"] == 50
    assert Manifest.parse(TEXT) == MANIFEST


@given(position=st.integers(0, len(TEXT) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(position: int, bit: int) -> None:
    raw = bytearray(TEXT.encode())
    raw[position] ^= 1 << bit
    with pytest.raises(ValueError):  # decoding, JSON, schema and seal all end in ValueError
        Manifest.parse(raw.decode())


@given(length=st.integers(0, len(TEXT) - 1))
def test_every_truncation_is_refused(length: int) -> None:
    with pytest.raises(ValueError):
        Manifest.parse(TEXT[:length])


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"manifest": 3}', '{"sha256": "", "manifest": {"step": 1}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.parse(text)


def test_a_sealed_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    for name in ("../secret", "/etc/passwd", "a/b", "..", "", "."):
        forged = MANIFEST.model_copy(update={"files": MANIFEST.files | {name: MANIFEST.files[".metadata"]}})
        (tmp_path / "manifest.json").write_text(forged.render())
        with pytest.raises(CheckpointError, match="is damaged"):
            read_manifest(tmp_path)


def test_a_manifest_without_hashes_of_what_is_read_is_refused(tmp_path: Path) -> None:
    poor = MANIFEST.model_copy(update={"files": {"__0_0.distcp": MANIFEST.files["__0_0.distcp"]}})
    (tmp_path / "manifest.json").write_text(poor.render())
    with pytest.raises(CheckpointError, match=r"does not list \.metadata, trainer\.json"):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)


def test_damage_names_expected_and_actual(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    record = record_of(path)
    assert damage_of(path, record) is None
    path.write_bytes(b"ab")
    assert "has 2 bytes, not 3" in str(damage_of(path, record))
    path.write_bytes(b"abd")
    altered = record_of(path).sha256
    assert f"has SHA-256 {altered}, not {record.sha256}" in str(damage_of(path, record))
    path.unlink()
    assert "No such file" in str(damage_of(path, record))
