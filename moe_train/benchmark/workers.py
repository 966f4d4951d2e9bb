"""Processes of their own for variants: an allocator, a number of threads, a rank are settled when a process starts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias, cast

from moe_train.benchmark.timing import Timed

Builder: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Timed | float]]
"""Makes variants, and numbers to know beside them, from arguments that JSON can carry."""


class WorkerError(RuntimeError):
    """A worker has ended or cannot build its variants; the message is the last line that it printed."""


class Worker:
    """A process that builds variants and times one when asked.

    Args:
        builder: ``module:function``, a `Builder`.
        arguments: for it.
        environment: variables added to this process's; None removes one.
    """

    def __init__(self, builder: str, arguments: Mapping[str, Any], environment: Mapping[str, str | None]) -> None:
        wanted = os.environ | dict(environment)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_train.benchmark.workers", builder, json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in wanted.items() if value is not None},
        )
        self._answer: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Wait until the variants are built; return their names (``variants``) and the numbers (``facts``)."""
        self._answer = self._answer or self._read()
        return self._answer

    def start(self, variant: str) -> None:
        """Ask for one run; several workers are asked before any is waited for."""
        assert self._process.stdin is not None, "made with a pipe"
        self._process.stdin.write(variant + "\n")
        self._process.stdin.flush()

    def wait_ms(self) -> float:
        """Wait for the run that was asked for; return how long it took, in milliseconds."""
        return float(self._read()["ms"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None, "made with pipes"
        for line in self._process.stdout:
            if line.startswith("{"):  # whatever else a library prints
                return cast("dict[str, Any]", json.loads(line))
        told = self._process.stderr.read().strip().splitlines()
        raise WorkerError(told[-1] if told else f"ended with status {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


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
        """Run once; the slowest worker's time."""
        for worker in self.workers:
            worker.start(self.variant)
        return max(worker.wait_ms() for worker in self.workers)


def main(builder: str, arguments: str) -> None:
    """Build variants and time one per line of the standard input, until it ends."""
    module, _, function = builder.partition(":")
    built = getattr(importlib.import_module(module), function)(json.loads(arguments))
    variants = {name: value for name, value in built.items() if not isinstance(value, float)}
    facts = {name: value for name, value in built.items() if isinstance(value, float)}
    tell({"variants": list(variants), "facts": facts})
    for line in sys.stdin:
        tell({"ms": variants[line.strip()].run_ms()})


def tell(answer: Mapping[str, object]) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
