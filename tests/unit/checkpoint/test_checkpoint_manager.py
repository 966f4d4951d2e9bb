"""Publishing, retention and the choice of the latest good checkpoint, with damage and crashes."""

import contextlib
import errno
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_samples import Lone, make_state, parts, zeros_like
from hypothesis import given, settings
from hypothesis import strategies as st
from part_samples import values_of
from spawn import clean_context

from moe_train.checkpoint import manager
from moe_train.checkpoint.faults import FAULT_POINTS, FAULT_VARIABLE
from moe_train.checkpoint.reader import latest_good, step_name
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.errors import CheckpointError

StateAt = Callable[[int], CheckpointState]
EVERY_FILE = ("__0_0.distcp", ".metadata", "trainer.json", "random_00000.bin", "manifest.json")


@pytest.fixture
def run(lone: Lone, tmp_path: Path, state_at: StateAt) -> Path:
    """A run folder with checkpoints of steps 10 and 20."""
    saver = lone.manager(tmp_path / "checkpoints")
    for step in (10, 20):
        saver.save(step, state_at(step))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def resumed_step(lone: Lone, run: Path, setting: str) -> int | None:
    found = lone.manager(run / "checkpoints").resume(setting)
    return None if found is None else found.step


def test_a_run_without_checkpoints_starts_anew(lone: Lone, tmp_path: Path) -> None:
    assert lone.manager(tmp_path / "checkpoints").resume("auto") is None


@pytest.mark.parametrize(("setting", "step"), [("auto", 20), ("never", None)])
def test_resume_settings(lone: Lone, run: Path, setting: str, step: int | None) -> None:
    assert resumed_step(lone, run, setting) == step


@pytest.mark.parametrize(
    ("below", "step"), [(".", 20), ("checkpoints", 20), ("checkpoints/step_00000010", 10), ("best", 10)]
)
def test_a_path_may_name_a_run_its_checkpoints_one_or_a_copy(lone: Lone, run: Path, below: str, step: int) -> None:
    shutil.copytree(run / "checkpoints/step_00000010", run / "best")
    assert resumed_step(lone, run, str(run / below)) == step


def test_a_path_without_checkpoint_is_refused(lone: Lone, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: holds no checkpoint; give the folder of a checkpoint"):
        lone.manager(run / "checkpoints").resume(str(run / "nowhere"))


def test_the_newest_are_kept(lone: Lone, run: Path, state_at: StateAt) -> None:
    saver = lone.manager(run / "checkpoints", keep=2)
    saver.resume("auto")
    saver.save(30, state_at(30))
    saver.save(40, state_at(40))
    assert names(run / "checkpoints") == ["step_00000030", "step_00000040"]


def test_saving_a_published_step_again_changes_nothing(lone: Lone, run: Path, state_at: StateAt) -> None:
    before = (run / "checkpoints/step_00000020/manifest.json").read_text()
    saver = lone.manager(run / "checkpoints")
    saver.resume("auto")
    assert saver.save(20, state_at(99)) == run / "checkpoints/step_00000020"
    assert (run / "checkpoints/step_00000020/manifest.json").read_text() == before
    assert names(run / "checkpoints") == ["step_00000010", "step_00000020"]


# --- another history in the same folder ---


@pytest.mark.parametrize("setting", ["never", "checkpoints/step_00000010"])
def test_a_repeated_run_neither_reuses_nor_loses_what_was_there(
    lone: Lone, run: Path, state_at: StateAt, setting: str
) -> None:
    saver = lone.manager(run / "checkpoints")
    saver.resume(setting if setting == "never" else str(run / setting))
    assert names(run / "checkpoints") == ["step_00000010", "step_00000020"], "until it has something to save"
    new = state_at(99)
    saver.save(20, new)
    assert "superseded_step_00000020_1" in names(run / "checkpoints")
    found = lone.manager(run / "checkpoints").resume("auto")
    assert found is not None
    filled = zeros_like(new)
    found.fill(parts(filled))
    assert torch.equal(filled["model.embed"], values_of(new.parts)["model.embed"])


def test_a_damaged_checkpoint_is_written_anew_when_the_run_comes_by_again(
    lone: Lone, run: Path, state_at: StateAt
) -> None:
    (run / "checkpoints/step_00000020/trainer.json").unlink()
    saver = lone.manager(run / "checkpoints")
    assert saver.resume("auto").step == 10
    saver.save(20, state_at(20))
    assert resumed_step(lone, run, "auto") == 20


# --- damage ---


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "truncated by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "one bit flipped": flip_bit,
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_damaged_checkpoint_is_passed_over(
    lone: Lone, run: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    newest = run / "checkpoints/step_00000020"
    assert set(names(newest)) == set(EVERY_FILE), "every type of file is covered"
    DAMAGES[damage](newest / name)
    with caplog.at_level(logging.WARNING):
        assert resumed_step(lone, run, "auto") == 10
    assert "going back to step 10, 10 steps are lost" in caplog.text
    assert str(newest / name) in caplog.text
    with pytest.raises(CheckpointError, match=name):
        resumed_step(lone, run, str(newest))


def test_the_warning_says_what_was_expected(lone: Lone, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = run / "checkpoints/step_00000020/__0_0.distcp"
    size = shard.stat().st_size
    DAMAGES["truncated by a byte"](shard)
    resumed_step(lone, run, "auto")
    assert f"has {size - 1} bytes, not {size}" in caplog.text


def test_when_all_are_damaged_the_run_is_not_thrown_away(lone: Lone, run: Path) -> None:
    for step in (10, 20):
        flip_bit(run / "checkpoints" / step_name(step) / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        resumed_step(lone, run, "auto")
    assert "none of the 2 checkpoints is intact" in str(caught.value)
    assert len(caught.value.problems) == 3
    assert resumed_step(lone, run, "never") is None


def test_a_folder_with_the_wrong_step_in_its_name_is_damaged(lone: Lone, run: Path) -> None:
    (run / "checkpoints/step_00000020").rename(run / "checkpoints/step_00000090")
    assert resumed_step(lone, run, "auto") == 10


def test_foreign_names_are_ignored_and_kept(
    lone: Lone, run: Path, state_at: StateAt, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000020", folder / "step_999")
    shutil.copytree(folder / "step_00000020", folder / "step-5.bak")
    (folder / "step_00000777").write_text("a file")
    (folder / "step_00000888").symlink_to(folder / "step_00000888")
    (folder / "step_00000889").symlink_to(folder / "step_00000020")
    (folder / "notes.txt").write_text("")
    foreign = set(names(folder)) - {"step_00000010", "step_00000020"}
    saver = lone.manager(folder, keep=1)
    assert saver.resume("auto").step == 20
    assert "step_999" in caplog.text
    saver.save(30, state_at(30))
    assert set(names(folder)) == foreign | {"step_00000030"}


# --- failures of a save ---


@pytest.mark.parametrize("point", [point for point in FAULT_POINTS if "prune" not in point])
def test_a_failed_save_leaves_the_older_ones_and_no_trace(
    lone: Lone, run: Path, state_at: StateAt, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    saver = lone.manager(run / "checkpoints")
    saver.resume("auto")
    monkeypatch.setenv(FAULT_VARIABLE, f"{point}:raise")
    with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*No space left on device"):
        saver.save(30, state_at(30))
    assert names(run / "checkpoints") == ["step_00000010", "step_00000020"]
    monkeypatch.delenv(FAULT_VARIABLE)
    saver.save(30, state_at(30))
    assert resumed_step(lone, run, "auto") == 30


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_under_the_tensors(
    lone: Lone, run: Path, state_at: StateAt, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, "injected")

    saver = lone.manager(run / "checkpoints")
    saver.resume("auto")
    monkeypatch.setattr(torch, "save", fail)  # what torch's writer calls for each tensor
    with pytest.raises(CheckpointError, match=r"writing tensors on rank 0: .*injected"):
        saver.save(30, state_at(30))
    assert names(run / "checkpoints") == ["step_00000010", "step_00000020"]
    assert resumed_step(lone, run, "auto") == 20


def test_an_error_of_ours_is_shown_with_its_traceback(lone: Lone, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointError, match="TypeError"):
        lone.manager(run / "checkpoints").save(30, CheckpointState({}, {"step": object()}, None))
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("point", ["ckpt.before_prune", "ckpt.mid_prune"])
def test_failing_to_prune_is_a_warning(
    lone: Lone,
    run: Path,
    state_at: StateAt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    point: str,
) -> None:
    saver = lone.manager(run / "checkpoints", keep=1)
    saver.resume("auto")
    monkeypatch.setenv(FAULT_VARIABLE, f"{point}:raise")
    saver.save(30, state_at(30))
    assert "could not be deleted" in caplog.text
    assert resumed_step(lone, run, "auto") == 30


# --- crashes ---


def save_and_be_killed(folder: Path, point: str) -> None:
    os.environ[FAULT_VARIABLE] = f"{point}:kill"
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        saver = Lone(world, build_mesh(world, 1)).manager(folder, keep=1)
        assert saver.resume("auto").step == 20
        saver.save(30, make_state(30))


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_any_point_leaves_a_good_checkpoint(lone: Lone, run: Path, state_at: StateAt, point: str) -> None:
    process = clean_context().Process(target=save_and_be_killed, args=(run / "checkpoints", point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    saver = lone.manager(run / "checkpoints", keep=1)
    found = saver.resume("auto")
    assert found is not None
    assert found.step == (30 if "prune" in point else 20)
    filled = zeros_like(state_at(0))
    found.fill(parts(filled))
    assert all(torch.equal(filled[key], tensor) for key, tensor in values_of(state_at(found.step).parts).items())
    assert not [name for name in names(run / "checkpoints") if name.startswith(".")]
    saver.save(40, state_at(40))
    assert names(run / "checkpoints") == ["step_00000040"]


class Crash(BaseException):
    """Stands for SIGKILL: no handler of the package catches it, nothing is cleaned up."""


@settings(max_examples=15, deadline=None)
@given(
    keep=st.integers(1, 3),
    lives=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(FAULT_POINTS)), min_size=1, max_size=4),
)
def test_there_is_a_good_checkpoint_at_every_instant(lone: Lone, keep: int, lives: list[tuple[int, str]]) -> None:
    """Each life of the run makes some saves and crashes in the next; after every fault point one checkpoint is good."""
    armed: list[str] = []
    newest = 0

    def look(point: str) -> None:
        nonlocal newest
        found = latest_good(folder, lone.world)
        step = 0 if found is None else found.step
        assert step >= newest, f"at {point} the run had {newest} and would go back to {step}"
        newest = step
        if point in armed:
            raise Crash

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place, "checkpoints")
        patch.setattr(manager, "fault_point", look)
        for saves, point in lives:
            saver = lone.manager(folder, keep)
            saver.resume("auto")
            for step in range(newest + 10, newest + 10 * saves + 1, 10):
                saver.save(step, make_state(step))
                assert newest == step
                assert len(names(folder)) <= keep
            armed.append(point)
            with contextlib.suppress(Crash):
                saver.save(newest + 10, make_state(newest + 10))
            armed.clear()
