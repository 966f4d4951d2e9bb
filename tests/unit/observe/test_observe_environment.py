import json
import subprocess
import sys

import pytest

from moe_train.observe import environment as module
from moe_train.observe.environment import environment, git_state

SECRET = "s3cr3t-value-9876"


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_it_is_json_and_says_what_matters():
    found = json.loads(json.dumps(environment(accelerator=None)))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] and found["packages"]["moe_train"]
    assert found["cpu"]["cores"] >= found["cpu"]["usable_cores"] >= 1
    assert found["memory_gib"] > 0.1
    assert found["started_utc"].endswith("+00:00")
    assert found["accelerator"] is None


def test_the_accelerator_is_what_the_caller_says():
    assert environment({"name": "H200", "memory_gib": 139})["accelerator"] == {"name": "H200", "memory_gib": 139}


def test_no_secret_is_stored(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_UNHEARD_OF_CREDENTIAL"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "moe_train.train", f"data.path=s3://u:{SECRET}@b", SECRET])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment(accelerator=None)
    assert SECRET not in json.dumps(found)
    assert found["command"][:3] == ["python", "-m", "moe_train.train"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


def test_git_state_of_a_clean_and_a_changed_checkout(checkout):
    clean = git_state(checkout)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (checkout / "file").write_text("two")
    changed = git_state(checkout)
    assert changed == {"commit": clean["commit"], "dirty": True}


def test_without_checkout_or_git_there_is_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None

    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", missing)
    assert git_state(tmp_path) is None
