"""How the ratings of vaderSentiment come into the environment, from a made-up distribution of the same shape."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

PATH = Path(__file__).parents[3] / "scripts" / "fetch_vader.py"
CONTENTS = {"LICENSE.txt": b"MIT", "tweets_GroundTruth.txt": b"1\t2.5\tfine\r\n"}


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("fetch_vader", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FILES", {name: sha256(content).hexdigest() for name, content in CONTENTS.items()})
    monkeypatch.setattr(module, "download", lambda folder: distribution(module, folder, CONTENTS))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    return module


@pytest.fixture
def target(tmp_path):
    return tmp_path / "venv" / "share" / "moe_train" / "vader"


def distribution(script, folder: Path, contents: dict[str, bytes]) -> Path:
    """An archive in an archive, with a file that nobody wants and paths that lead elsewhere."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in ("tweets_GroundTruth.txt", "paper.pdf"):
            info = tarfile.TarInfo(f"../../hutto/{name}")
            info.size = len(contents.get(name, b""))
            tar.addfile(info, io.BytesIO(contents.get(name, b"")))
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip", "w") as outer:
        outer.writestr(f"{script.FOLDER}/LICENSE.txt", contents["LICENSE.txt"])
        outer.writestr(script.INNER, inner.getvalue())
    return folder / "vaderSentiment-0.5.zip"


def held(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_it_keeps_the_wanted_files_and_nothing_else(script, target, capsys):
    script.main()
    assert held(target) == CONTENTS
    assert [path.name for path in target.parent.iterdir()] == ["vader"]
    assert f"2 files in {target}" in capsys.readouterr().out


def test_it_does_nothing_when_they_are_there(script, target, monkeypatch, capsys):
    script.main()
    capsys.readouterr()
    monkeypatch.setattr(script, "download", lambda folder: pytest.fail("fetched again"))
    script.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_it_mends_what_is_not_whole(script, target, how):
    script.main()
    file = target / "tweets_GroundTruth.txt"
    file.write_bytes(b"else") if how == "damaged" else file.unlink()
    script.main()
    assert held(target) == CONTENTS


def test_another_content_is_refused_and_nothing_is_written(script, target, monkeypatch, capsys):
    monkeypatch.setattr(
        script, "download", lambda folder: distribution(script, folder, {**CONTENTS, "LICENSE.txt": b"x"})
    )
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    assert "does not hold the LICENSE.txt that it once held" in capsys.readouterr().err
    assert not target.exists()


def test_an_environment_that_cannot_be_written(script, target, capsys):
    target.parent.parent.parent.mkdir(parents=True)
    target.parent.parent.write_text("a file in the place of the folder")
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_pip_that_fails_is_said(tmp_path, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("fetch_vader", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2
    assert "pip could not download vaderSentiment==0.5" in capfd.readouterr().err
