"""Processes of their own for variants: an allocator, a number of threads, a rank are settled when a process starts."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, TypeAlias, cast

from moe_train.benchmark.timing import Timed, last_line

Builder: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Timed | float]]
"""Makes variants, and numbers to know beside them, from arguments that JSON can carry."""
BUILD = "build "
"""What a line begins with that asks for other variants; any other line is the name of one to run."""


class WorkerError(RuntimeError):
    """A worker has ended, does not answer, or cannot build or run a variant; the message says which and why."""


class Worker:
    """A process that builds variants and times one when asked.

    Args:
        builder: ``module:function``, a `Builder`.
        arguments: for it.
        environment: variables added to this process's; None removes one.
        timeout_s: longest wait for one answer, in seconds; the worker is then given up.
    """

    def __init__(
        self,
        builder: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str | None],
        timeout_s: float = 600.0,
    ) -> None:
        self.builder = builder
        self.timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process; a pipe could fill up)
        wanted = os.environ | dict(environment)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_train.benchmark.workers", builder, json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={name: value for name, value in wanted.items() if value is not None},
        )
        assert self._process.stdout is not None, "made with a pipe"
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
        self._reader.start()
        self._ready: dict[str, Any] | None = None
        self._failed: WorkerError | None = None
        self._running = ""

    def ready(self) -> dict[str, Any]:
        """Wait until the variants are built; return their names (``variants``) and the numbers (``facts``)."""
        if self._failed is not None:
            raise self._failed
        try:
            self._ready = self._ready or self._answer(self.builder)
        except WorkerError as error:
            self._failed = error  # there will be no second answer to wait for
            raise
        return self._ready

    def order(self, arguments: Mapping[str, Any]) -> None:
        """Ask for other variants in the place of those that are there; `ready` waits for them."""
        with contextlib.suppress(WorkerError):
            self.ready()  # an answer that nobody waited for must not be taken for the next
        self._ask(BUILD + json.dumps(dict(arguments)))
        self._ready = self._failed = None

    def rebuild(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Build other variants in the same process, and return what `ready` returns."""
        self.order(arguments)
        return self.ready()

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def start(self, variant: str) -> None:
        """Ask for one run; several workers are asked before any is waited for."""
        self._running = variant
        self._ask(variant)

    def wait_ms(self) -> float:
        """Wait for the run that was asked for; return how long it took, in milliseconds."""
        return float(self._answer(self._running)["ms"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None, "made with pipes"
            try:
                pipe.close()
            except BrokenPipeError:  # what was asked of a process that had ended
                continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None, "made with a pipe"
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError(self._told(line)) from error

    def _answer(self, task: str) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=self.timeout_s)
            except queue.Empty:
                self._process.kill()  # what it answers later would be taken for the answer to another question
                raise WorkerError(f"{task}: no answer within {self.timeout_s:g} s") from None
            if line is None:
                raise WorkerError(self._told(task))
            if not line.startswith("{"):  # whatever else a library prints
                continue
            answer = cast("dict[str, Any]", json.loads(line))
            if "error" in answer:
                raise WorkerError(f"{task}: {answer['error']}")
            return answer

    def _told(self, task: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        told = last_line(self._errors.read().decode(errors="replace"))
        if status == -signal.SIGKILL:  # nobody here sends it before the end
            told = "killed, as the system does when memory runs out: time fewer variants at once"
        return f"{task}: {told or f'ended with status {status}'}"


def _read(pipe: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Pass on lines until the process ends, then None."""
    for line in pipe:
        lines.put(line)
    lines.put(None)


@dataclass(frozen=True)
class Together:
    """One variant that several workers run at the same time, as the ranks of a group do.

    Attributes:
        workers: all of them.
        variant: name of it in each.
    """

    workers: tuple[Worker, ...]
    variant: str

    def run_ms(self) -> float:
        """Run once; the slowest worker's time.

        Raises:
            WorkerError: of the first that failed; the others have been waited for, so that no answer is left over.
        """
        for worker in self.workers:
            worker.start(self.variant)
        slowest_ms, failure = 0.0, None
        for worker in self.workers:
            try:
                slowest_ms = max(slowest_ms, worker.wait_ms())
            except WorkerError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return slowest_ms


def main(builder: str, arguments: str) -> None:
    """Build variants and time one per line of the standard input, until it ends."""
    module, _, function = builder.partition(":")
    build: Builder = getattr(importlib.import_module(module), function)
    variants = built(build, arguments)
    for line in sys.stdin:
        if line.startswith(BUILD):
            variants = {}  # before others take their memory
            variants = built(build, line.removeprefix(BUILD))
        else:
            tell(outcome(variants, line.strip()))


def built(build: Builder, arguments: str) -> dict[str, Timed]:
    """Build variants and tell which; a failure is told, too, and leaves none."""
    try:
        made = build(json.loads(arguments))
    except Exception as error:
        tell({"error": described(error)})
        return {}
    facts = {name: float(value) for name, value in made.items() if isinstance(value, int | float)}
    variants = {name: value for name, value in made.items() if not isinstance(value, int | float)}
    tell({"variants": list(variants), "facts": facts})
    return variants


def outcome(variants: Mapping[str, Timed], name: str) -> dict[str, object]:
    """Run a variant once; return its time, or what went wrong."""
    try:
        return {"ms": variants[name].run_ms()}
    except Exception as error:
        return {"error": described(error)}


def described(error: Exception) -> str:
    """Return kind and last line of an error."""
    return f"{type(error).__name__}: {last_line(str(error))}"


def tell(answer: Mapping[str, object]) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
