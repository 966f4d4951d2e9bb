"""The project as others meet it: as a wheel in an environment of its own, and as a fresh clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launch import ROOT, TINY, Variables, records, run_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
AWAY: Variables = {"PYTHONPATH": None}
"""The checkout must not be importable."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_words([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", ".", str(ROOT)], folder, AWAY, 300.0)
    (built,) = folder.glob("moe_train-*.whl")
    return built


def new_environment(folder: Path) -> Path:
    """Make an empty virtual environment and return its Python."""
    run_words([sys.executable, "-m", "venv", "venv"], folder, AWAY, 120.0)
    return folder / "venv" / "bin" / "python"


def assert_trains(python: Path, folder: Path, data: list[str]) -> None:
    """The installed package, presets included, trains away from its checkout."""
    place = run_words([str(python), "-c", "import moe_train; print(moe_train.__file__)"], folder, AWAY, 60.0).stdout
    assert Path(place.strip()).is_relative_to(folder / "venv"), place
    settings = [*TINY, *data, "model=switch_tiny", "train.steps=3", "run.dir=run"]
    run_words([str(python), "-m", "moe_train.train", *settings], folder, AWAY, 300.0)
    assert [row["step"] for row in records(folder / "run", "train")] == [1, 2, 3]
    assert (folder / "run" / "report" / "index.html").is_file()


def test_the_wheel_brings_its_presets(wheel: Path, data: list[str], tmp_path: Path) -> None:
    """The dependencies are those of this environment."""
    python = new_environment(tmp_path)
    run_words([str(python), "-m", "pip", "install", "--no-deps", str(wheel)], tmp_path, AWAY, 300.0)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A folder that a .pth file names is searched last, and its own .pth files are not read: no editable install.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    assert_trains(python, tmp_path, data)


def test_the_wheel_installs_with_all_it_needs(wheel: Path, data: list[str], tmp_path: Path) -> None:
    python = new_environment(tmp_path)
    install = ["install", "--quiet", str(wheel), "--constraint", str(ROOT / "constraints.txt")]
    run_words([str(python), "-m", "pip", *install], tmp_path, AWAY, 1500.0)
    assert_trains(python, tmp_path, data)


def test_a_fresh_clone_trains_with_one_command(tmp_path: Path) -> None:
    """With a home of its own: neither the caches nor the settings of whoever runs the tests may help it."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), "clone"], cwd=tmp_path, check=True)
    (tmp_path / "home").mkdir()
    downloads = os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    own_home: Variables = {**AWAY, "HOME": str(tmp_path / "home"), "PIP_CACHE_DIR": downloads}
    few = ["train.steps=4", "optim.warmup_steps=1", "eval.every=0", "sample.max_tokens=8"]
    words = ["bash", "scripts/quickstart.sh", *few]
    run_dir = tmp_path / "clone" / "runs" / "quickstart"
    for life in range(2):
        said = run_words(words, tmp_path / "clone", own_home, 1500.0).stdout
        closing = said.strip().splitlines()[-3:]
        assert closing[0].startswith("held-out loss ")
        assert closing[1].split() == ["run:", str(run_dir)]
        assert closing[2].split() == ["report:", str(run_dir / "report" / "index.html")]
        assert ("step 4/4" in said) == (life == 0), "the second start of a finished run trains nothing"
