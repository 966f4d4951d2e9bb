"""Starts the project's commands as a user would: as processes of their own, of which none is ever left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from moe_train.checkpoint.manifest import damage_of, read_manifest
from moe_train.checkpoint.reader import CHECKPOINTS, published_steps, step_name
from moe_train.errors import CheckpointError
from moe_train.observe.records import parse_record

ROOT = Path(__file__).resolve().parent.parent
MARK = "MOE_TRAIN_TEST_MARK"
"""Environment variable by which the processes of a command are found, whoever their parent is by now."""
RUN_TIMEOUT_S = 120.0
SERVICES_END_S = 5.0
"""For services of a library (wandb) to notice that their process has ended."""
Variables = Mapping[str, str | None]
AS_INHERITED: Variables = {}
TINY = [
    "model.dim=32", "model.layers=2", "model.heads=2", "model.attention.kv_heads=1", "model.ffn.expert_dim=16",
    "data.seq_len=32", "data.heldout_fraction=0.1", "train.global_batch=8", "optim.warmup_steps=1", "log.every=1",
    "log.wandb.mode=disabled", "eval.every=0", "checkpoint.every=0", "sample.max_tokens=8",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str
    seconds: float


class Command:
    """A running command.

    Args:
        words: the command line.
        folder: where it runs; receives its output in files, which cannot block it as a full pipe would.
        variables: added to the environment; None removes one.
    """

    def __init__(self, words: Sequence[str], folder: Path, variables: Variables = AS_INHERITED) -> None:
        self.mark = uuid.uuid4().hex
        self.start_s = time.monotonic()
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        wanted = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark} | dict(variables)
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env={name: value for name, value in wanted.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def alive(self) -> list[psutil.Process]:
        """Every process of the command, orphans too; what is dead but not waited for does not count."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank_pids(self) -> dict[int, int]:
        """The process id of each rank that torchrun has started."""
        pids = {}
        for process in self.alive():
            with contextlib.suppress(psutil.Error, KeyError):
                pids[int(process.environ()["RANK"])] = process.pid
        return pids

    def signal(self, number: int) -> None:
        """Send a signal to the command itself: the launcher, when there is one."""
        os.kill(self.process.pid, number)

    def kill_all(self) -> None:
        """SIGKILL every process, ranks before their launcher, until none is left."""
        while processes := self.alive():
            for process in sorted(processes, key=lambda p: p.pid == self.process.pid):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = 120.0) -> Ended:
        """Wait for the end of the command; its output is shown when it takes too long."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s\n{self.output()}") from None
        seconds = time.monotonic() - self.start_s
        return Ended(status, self.out.read_text(), self.err.read_text(), seconds)

    def output(self) -> str:
        """What the command has printed so far."""
        return f"--- stdout ---\n{self.out.read_text()}\n--- stderr ---\n{self.err.read_text()}"


def free_port() -> int:
    """A port that nobody listens on; rendezvous needs one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def running(words: Sequence[str], folder: Path, variables: Variables = AS_INHERITED) -> Iterator[Command]:
    """Run a command line for as long as the context lasts."""
    command = Command(words, folder, variables)
    try:
        yield command
    finally:
        command.kill_all()


def started(
    door: str, overrides: Sequence[str], folder: Path, ranks: int = 1, variables: Variables = AS_INHERITED
) -> contextlib.AbstractContextManager[Command]:
    """Run ``moe_train.DOOR`` on so many ranks for as long as the context lasts."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return running([sys.executable, "-m", *launcher, f"moe_train.{door}", *overrides], folder, variables)


def run(
    door: str,
    overrides: Sequence[str],
    folder: Path,
    ranks: int = 1,
    variables: Variables = AS_INHERITED,
    status: int | None = 0,
) -> Ended:
    """Run ``moe_train.DOOR`` to its end, which must have exit status ``status`` (None: any) and leave no process."""
    with started(door, overrides, folder, ranks, variables) as command:
        return end_of(command, RUN_TIMEOUT_S, status)


def run_words(words: Sequence[str], folder: Path, variables: Variables, timeout_s: float) -> Ended:
    """Run a command line to its end, which must be a success and leave no process."""
    with running(words, folder, variables) as command:
        return end_of(command, timeout_s, 0)


def end_of(command: Command, timeout_s: float, status: int | None) -> Ended:
    """Wait for a command's end and check it."""
    ended = command.wait(timeout_s)
    assert status is None or ended.status == status, f"exit status {ended.status}\n{command.output()}"
    wait_until(lambda: not command.alive(), SERVICES_END_S, "the end of every process of the command")
    return ended


def stop_at(step: int, number: int, overrides: Sequence[str], run_dir: Path, ranks: int = 1) -> Ended:
    """Train in ``run_dir`` and send the command a signal once ``step`` is recorded."""
    with started("train", [*overrides, f"run.dir={run_dir}"], run_dir.parent, ranks) as command:
        wait_for_step(command, run_dir, step)
        command.start_s = time.monotonic()
        command.signal(number)
        ended = command.wait(60.0)
        assert not command.alive(), f"processes were left behind\n{command.output()}"
    return ended


def wait_until(condition: Callable[[], object], timeout_s: float, what: str, poll_s: float = 0.01) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(poll_s)


def wait_for_step(command: Command, run_dir: Path, step: int, timeout_s: float = 90.0) -> None:
    """Wait until the run has recorded ``step``; fail when the command ends before."""

    def reached() -> bool:
        done = max((record["step"] for record in records(run_dir, "train")), default=0) >= step
        assert done or command.process.poll() is None, f"ended before step {step}\n{command.output()}"
        return done

    wait_until(reached, timeout_s, f"step {step}")


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind; a line that is being written is passed over."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for line in lines if (record := parse_record(line)) and record["kind"] == kind]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """Of each train record what a resumed run must repeat to the last bit, the load of each expert included."""
    exact = ["step", "loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens"]
    loads = ["moe/layer_00/load", "moe/layer_01/load"]
    return [tuple(record[key] for key in exact + loads) for record in records(run_dir, "train")]


def good_steps(run_dir: Path) -> list[int]:
    """The published checkpoints of a run of which every file is what its manifest says."""
    return [step for step in published_steps(run_dir / CHECKPOINTS) if is_good(checkpoint_path(run_dir, step))]


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    try:
        files = read_manifest(checkpoint).files
    except CheckpointError:
        return False
    return all(damage_of(checkpoint / name, record) is None for name, record in files.items())


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return run_dir / CHECKPOINTS / step_name(step)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights and optimizer state."""
    reader = FileSystemReader(checkpoint)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that there is no process group here
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_tensors(found: Path, wanted: Path) -> None:
    """Two checkpoints hold the same, bit for bit."""
    a, b = tensors_of(found), tensors_of(wanted)
    assert a.keys() == b.keys() and len(a) > 20
    different = [key for key in b if not torch.equal(a[key], b[key])]
    assert not different, f"{found} differs from {wanted} in {different}"


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The signals that ask a run to stop, with its exit status."""
