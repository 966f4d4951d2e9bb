"""Saving beside the training: what is published, when it is waited for, how it fails, and what a crash leaves."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_samples import Lone, make_state, parts, zeros_like
from part_samples import values_of
from spawn import clean_context
from torch import Tensor

from moe_train.checkpoint import manager as manager_module
from moe_train.checkpoint.background import GRACE_S, BackgroundSaver, Staging
from moe_train.checkpoint.faults import FAULT_POINTS, FAULT_VARIABLE
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import latest_good
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.parts import Box, Part
from moe_train.dist.world import World, joined
from moe_train.errors import CheckpointError

StateAt = Callable[[int], CheckpointState]


class Gate:
    """Holds the writing thread at a point until it is opened."""

    def __init__(self, point: str) -> None:
        self.point, self.reached, self.opened = point, threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point == self.point:
            assert threading.current_thread() is not threading.main_thread(), "written beside the training"
            self.reached.set()
            assert self.opened.wait(30.0)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate("ckpt.before_temp")  # before anything is written, the small files too
    monkeypatch.setattr(manager_module, "fault_point", made)
    yield made
    made.opened.set()


@pytest.fixture
def saver(lone: Lone, tmp_path: Path) -> Iterator[BackgroundSaver]:
    made = BackgroundSaver(lone.manager(tmp_path / "checkpoints"))
    yield made
    with contextlib.suppress(CheckpointError):
        made.wait()


def published(lone: Lone, saver: BackgroundSaver) -> dict[str, Tensor]:
    found = latest_good(saver.manager.folder, lone.world)
    assert found is not None
    tensors = zeros_like(make_state(0))
    found.fill(parts(tensors))
    return tensors | {"step": torch.tensor(found.trainer["step"])}


def test_what_changes_after_the_call_is_not_published(lone: Lone, saver: BackgroundSaver, gate: Gate) -> None:
    state = make_state(10)
    truth = {key: tensor.clone() for key, tensor in values_of(state.parts).items()}
    saver.save(10, state)
    assert gate.reached.wait(30.0), "it writes"
    for tensor in values_of(state.parts).values():
        tensor.fill_(99.0)  # the optimizer's next step
    state.trainer["step"] = 11  # type: ignore[index]
    gate.opened.set()
    saved = saver.wait()
    assert saved is not None and (saved.step, saved.path.name) == (10, "step_00000010")
    assert 0.0 < saved.stall_ms < saved.total_ms
    found = published(lone, saver)
    assert found.pop("step") == 10
    assert all(torch.equal(found[key], truth[key]) for key in truth)


def test_a_save_waits_for_the_one_before(saver: BackgroundSaver, gate: Gate, state_at: StateAt) -> None:
    """Two at once would share the copy, and publish in any order."""
    saver.save(10, state_at(10))
    assert gate.reached.wait(30.0)
    assert not saver.manager.folder.joinpath("step_00000010").exists(), "the call did not wait for the disk"
    threading.Timer(0.2, gate.opened.set).start()
    saver.save(20, state_at(20))
    assert saver.manager.folder.joinpath("step_00000010").exists()
    assert saver.wait().step == 20
    assert saver.wait() is None, "told once"


def test_the_copies_are_used_again(saver: BackgroundSaver, state_at: StateAt) -> None:
    saver.save(10, state_at(10))
    first = {key: buffer.data_ptr() for key, buffer in saver.staging.buffers.items()}
    saver.save(20, state_at(20))
    assert {key: buffer.data_ptr() for key, buffer in saver.staging.buffers.items()} == first


def test_copies_of_another_shape_place_or_format_are_made_anew() -> None:
    staging = Staging()
    places = [(4, 2), (4, 2), (6, 2)]
    formats = [torch.float32, torch.float64, torch.float32]
    for offset, (size, dtype) in enumerate(zip(places, formats, strict=True)):
        values = torch.randn(size, dtype=dtype).t()
        part = Part((20, 20), (Box(values, (offset, 0)), Box(values + 1, (offset, 10))))
        copied = staging.copy({"w": part})["w"]
        assert copied.shape == (20, 20)
        for box, original in zip(copied.boxes, part.boxes, strict=True):
            assert box.offsets == original.offsets and torch.equal(box.values, original.values)
            assert box.values.dtype == dtype and box.values.data_ptr() != original.values.data_ptr()
        assert len(staging.buffers) == 2, "what is not held any more is given back"


def test_tensors_that_require_gradients_are_copied() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    copied = Staging().copy({"w": Part.whole(parameter)})
    assert not copied["w"].boxes[0].values.requires_grad


@pytest.mark.parametrize("ask", ["wait", "save"])
def test_a_failure_is_told_at_the_next_call_and_earlier_checkpoints_stay(
    lone: Lone, saver: BackgroundSaver, state_at: StateAt, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    saver.save(10, state_at(10))
    saver.wait()
    monkeypatch.setenv(FAULT_VARIABLE, "ckpt.before_rename:raise")
    saver.save(20, state_at(20))
    with pytest.raises(CheckpointError, match=r"publishing on rank 0: .*No space left on device"):
        saver.wait() if ask == "wait" else saver.save(30, state_at(30))
    assert [path.name for path in saver.manager.folder.iterdir()] == ["step_00000010"]
    monkeypatch.delenv(FAULT_VARIABLE)
    saver.save(40, state_at(40))
    assert saver.wait().step == 40, "the failure was told once"
    assert published(lone, saver)["step"] == 40


def test_the_end_of_a_run_waits(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    with BackgroundSaver(lone.manager(tmp_path)) as saver:
        saver.save(10, state_at(10))
    assert latest_good(tmp_path, lone.world).step == 10


def test_a_failed_run_does_not_wait_for_long(lone: Lone, tmp_path: Path, state_at: StateAt, gate: Gate) -> None:
    start_s = time.perf_counter()
    with pytest.raises(ZeroDivisionError), BackgroundSaver(lone.manager(tmp_path)) as saver:
        saver.save(10, state_at(10))
        assert gate.reached.wait(30.0)
        raise ZeroDivisionError
    assert GRACE_S <= time.perf_counter() - start_s < GRACE_S + 5.0


def test_another_history_is_set_aside_once(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    """The saver must know where the run departs from, and must not take its own checkpoints for a stranger's."""
    lone.manager(tmp_path).save(50, state_at(50))
    repeated = lone.manager(tmp_path, keep=3)
    repeated.resume("never")
    with BackgroundSaver(repeated) as saver:
        for step in (10, 20):
            saver.save(step, state_at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000010", "step_00000020", "superseded_step_00000050_1",
    ]  # fmt: skip


# --- crashes ---


def save_and_be_killed(folder: Path, point: str) -> None:
    os.environ[FAULT_VARIABLE] = f"{point}:kill"
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        manager = CheckpointManager(folder, world, build_mesh(world, 1).layout, keep=1)
        assert manager.resume("auto").step == 20
        with BackgroundSaver(manager) as saver:
            state = make_state(30)
            saver.save(30, state)
            for tensor in values_of(state.parts).values():
                tensor.fill_(99.0)


def end_by_error(folder: Path) -> None:
    """An error while the thread waits for what never comes, as for a rank that hangs."""
    world = World(0, 1, torch.device("cpu"), 600.0)
    with joined(dist.HashStore(), world):
        manager = CheckpointManager(folder, world, build_mesh(world, 1).layout, keep=1)
        with BackgroundSaver(manager) as saver:
            manager_module.fault_point = lambda point: threading.Event().wait()
            saver.save(30, make_state(30))
            raise SystemExit(7)


def exit_code(work: Callable[..., None], *args: object) -> int | None:
    process = clean_context().Process(target=work, args=args)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_beside_the_training_is_survived(lone: Lone, tmp_path: Path, state_at: StateAt, point: str) -> None:
    lone.manager(tmp_path).save(20, state_at(20))
    assert exit_code(save_and_be_killed, tmp_path, point) == -signal.SIGKILL
    after = lone.manager(tmp_path, keep=1)
    found = after.resume("auto")
    assert found is not None
    assert found.step == (30 if "prune" in point else 20)
    filled = zeros_like(state_at(0))
    found.fill(parts(filled))
    assert all(torch.equal(filled[key], tensor) for key, tensor in values_of(state_at(found.step).parts).items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_process_that_fails_is_not_kept_alive_by_its_save(tmp_path: Path) -> None:
    start_s = time.perf_counter()
    assert exit_code(end_by_error, tmp_path) == 7
    assert time.perf_counter() - start_s < 30.0
