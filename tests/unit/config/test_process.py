"""The settings of a process: there before it starts, the user's own first, once, and nowhere that they mean nothing."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import process
from moe_train.config.groups import config_dir
from moe_train.config.process import MALLOC, SWITCH, THREADS

ROOT = config_dir().parent
NAMES = [*MALLOC, THREADS]
PROBE = """
import ctypes, json, os, sys
with open("starts", "a") as file:
    file.write("x")
from moe_train.config.process import settle

if __name__ == "__main__":
    settle("probe")
    argv, flags = sys.argv[1:], [sys.flags.dev_mode, sys.flags.optimize]
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.mallinfo2.restype = ctypes.c_size_t * 10
    class Information(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
    libc.mallinfo2.restype = Information
    before = libc.mallinfo2().hblks
    libc.malloc(64 << 20)
    mapped = libc.mallinfo2().hblks - before
    print(json.dumps({"pid": os.getpid(), "argv": argv, "flags": flags, "env": dict(os.environ), "mapped": mapped}))
    sys.exit(7)
"""
"""A command that tells how it was started, how often, and whether a large buffer goes back to the kernel."""
HAS_GLIBC = process.uses_glibc() and hasattr(ctypes.CDLL(None), "mallinfo2")
needs_glibc = pytest.mark.skipif(not HAS_GLIBC, reason="glibc 2.33 or newer")


def clean(**variables: str) -> dict[str, str]:
    """The environment without any setting, with the project to be found."""
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, SWITCH, "LOCAL_WORLD_SIZE")}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


def probe(folder: Path, *words: str, **variables: str) -> tuple[dict[str, Any], int]:
    """What the command told, and how often it was started."""
    (folder / "probe.py").write_text(PROBE)
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=clean(**variables), stdout=subprocess.PIPE, text=True
    ) as command:
        told, _ = command.communicate(timeout=60)
    assert command.returncode == 7, "the exit status is the command's own"
    answer = json.loads(told)
    assert answer["pid"] == command.pid, "a launcher knows its ranks by their ids"
    return answer, len((folder / "starts").read_text())


@needs_glibc
def test_a_command_is_started_anew_once_with_what_it_lacks(tmp_path: Path) -> None:
    answer, starts = probe(tmp_path, "-X", "dev", "-O", "-m", "probe", "-m", "run.seed=0,1", "-c", "job", "a= b ")
    assert starts == 2
    assert answer["argv"] == ["-m", "run.seed=0,1", "-c", "job", "a= b "]
    assert answer["flags"] == [True, 1], "Python's own options"
    assert {name: answer["env"][name] for name in MALLOC} == MALLOC
    assert answer["env"][THREADS] == str(process.cores())
    assert answer["env"][SWITCH] == ",".join(NAMES)
    assert answer["mapped"] == 0, "the allocator keeps what it gets"


@needs_glibc
def test_the_users_settings_stay(tmp_path: Path) -> None:
    own = {"MALLOC_MMAP_THRESHOLD_": "1000000", THREADS: "1"}
    answer, starts = probe(tmp_path, "-m", "probe", **own)
    assert starts == 2, "for the others"
    assert {name: answer["env"][name] for name in NAMES} == MALLOC | own
    assert answer["env"][SWITCH] == "MALLOC_TRIM_THRESHOLD_,MALLOC_TOP_PAD_"
    assert answer["mapped"] == 1


@needs_glibc
@pytest.mark.parametrize("settled", [{SWITCH: "0"}, {SWITCH: "anything"}, MALLOC | {THREADS: "2"}])
def test_nothing_is_started_anew_where_it_is_switched_off_or_done(tmp_path: Path, settled: dict[str, str]) -> None:
    answer, starts = probe(tmp_path, "-m", "probe", **settled)
    assert starts == 1
    assert {name: answer["env"].get(name) for name in NAMES} == {name: settled.get(name) for name in NAMES}


@needs_glibc
@pytest.mark.parametrize(
    "words", [("probe.py",), ("-c", "import runpy; runpy.run_module('probe', run_name='__main__')")]
)
def test_only_the_command_itself_is_started_anew(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Not a tool that runs it, and not what imports it."""
    answer, starts = probe(tmp_path, *words)
    assert starts == 1
    assert SWITCH not in answer["env"]


@pytest.mark.parametrize("error", [ValueError, OSError, AttributeError])
def test_nothing_happens_without_glibc(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise error(name)

    monkeypatch.setattr(os, "confstr", refuse)
    assert not process.uses_glibc()
    assert process.missing_settings({}, process.uses_glibc()) == {}


def test_a_process_that_cannot_be_started_anew_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []

    def refuse(path: str, words: list[str], environment: dict[str, str]) -> None:
        tried.append(words)
        raise PermissionError(path)

    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(process, "uses_glibc", lambda: True)
    monkeypatch.delenv(SWITCH, raising=False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "moe_train.train"}))
    process.settle("moe_train.bench")
    assert tried == [], "another command runs"
    process.settle("moe_train.train")
    assert tried == [[sys.executable, *sys.orig_argv[1:]]]


@given(st.sets(st.sampled_from(NAMES)))
def test_settings_and_what_is_there_are_all_settings(given_names: set[str]) -> None:
    found = process.missing_settings(dict.fromkeys(given_names, "own"), has_glibc=True)
    assert found.keys() | given_names == set(NAMES)
    assert not found.keys() & given_names


@pytest.mark.parametrize(("ranks", "threads"), [("1", 6), ("2", 3), ("4", 1), ("16", 1), ("", 6), ("x", 6), ("0", 6)])
def test_ranks_share_the_cores(ranks: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "cores", lambda: 6)
    assert process.missing_settings({"LOCAL_WORLD_SIZE": ranks}, True)[THREADS] == str(threads)


@pytest.mark.parametrize(("siblings", "allowed", "cores"), [(["0,4", "1,5"] * 2, 4, 2), (["0", "1"], 1, 1), ([], 3, 3)])
def test_hardware_threads_of_one_core_count_once(
    siblings: list[str], allowed: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(siblings):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    monkeypatch.setattr(process, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    assert process.cores() == cores


def by_launcher(ranks: int, **variables: str) -> dict[str, str]:
    """The settings that the launchers make."""
    words = ["bash", "-euo", "pipefail", "-c", f"source launch/settings.sh {ranks} && env"]
    told = subprocess.run(words, cwd=ROOT, env=clean(**variables), capture_output=True, text=True, check=True).stdout
    pairs = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    return {name: pairs[name] for name in (*NAMES, SWITCH) if name in pairs}


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_the_launchers_set_the_same(ranks: int) -> None:
    expected = process.missing_settings({"LOCAL_WORLD_SIZE": str(ranks)}, has_glibc=True)
    assert by_launcher(ranks) == expected | {SWITCH: ",".join(NAMES)}


def test_the_launchers_leave_alone_what_is_set_or_switched_off() -> None:
    own = {"MALLOC_TOP_PAD_": "5", THREADS: "3"}
    found = by_launcher(2, **own)
    assert {name: found[name] for name in own} == own
    assert found[SWITCH] == "MALLOC_MMAP_THRESHOLD_,MALLOC_TRIM_THRESHOLD_"
    assert by_launcher(2, **{SWITCH: "0"}) == {SWITCH: "0"}
    assert by_launcher(1, **(MALLOC | own))[SWITCH] == "user", "there was nothing to set"


def test_who_set_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "cores", lambda: 8)
    ours = {**MALLOC, THREADS: "8", SWITCH: ",".join(MALLOC)}
    told = process.told_settings(ours)
    assert told["MALLOC_TOP_PAD_"] == "67108864 (moe_train)"
    assert told[THREADS] == "8 (the user)"
    assert process.told_settings({})[THREADS] == "unset"
    assert process.settings_message({SWITCH: "0"}).endswith("OMP_NUM_THREADS unset; MOE_TRAIN_SETTINGS=0")
    under_torchrun = process.settings_message({THREADS: "1", "LOCAL_WORLD_SIZE": "2"})
    assert "OMP_NUM_THREADS 1 (torchrun or the user); 4 threads per rank would use all cores" in under_torchrun
    assert "would use" not in process.settings_message({THREADS: "1", "LOCAL_WORLD_SIZE": "8"})
