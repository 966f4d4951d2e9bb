"""Builders for workers: variants of known times, with every way to fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
REACHABLE = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
"""Variables of a worker that can import this module."""
MADE = "bench_samples:build"


class Pretended:
    """Takes the times that it is given, one per run."""

    def __init__(self, *ms: float) -> None:
        self.ms = list(ms)

    def run_ms(self) -> float:
        return self.ms.pop(0) if len(self.ms) > 1 else self.ms[0]


class Fails:
    """Fails after so many good runs."""

    def __init__(self, good_runs: int = 0) -> None:
        self.good_runs = good_runs

    def run_ms(self) -> float:
        self.good_runs -= 1
        if self.good_runs < 0:
            raise ValueError("first line\nit broke")
        return 1.0


class Hangs:
    def run_ms(self) -> float:
        time.sleep(3600)
        return 0.0


class Dies:
    def run_ms(self) -> float:
        sys.stderr.write("last words\n")
        sys.stderr.flush()
        os._exit(3)


class Killed:
    def run_ms(self) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0


def build(arguments: dict[str, Any]) -> dict[str, Any]:
    """Build what ``variants`` lists: name and ms, or one of the ways to fail; an environment variable adds to times."""
    print("a library says something")
    sys.stderr.write("x" * arguments.get("noise", 0))
    if "refuses" in arguments:
        raise RuntimeError(arguments["refuses"])
    ways = {"fails": Fails, "hangs": Hangs, "dies": Dies, "killed": Killed}
    extra_ms = float(os.environ.get("EXTRA_MS", "0"))
    made: dict[str, Any] = {
        name: ways[ms]() if isinstance(ms, str) else Pretended(ms + extra_ms)
        for name, ms in arguments["variants"].items()
    }
    return {
        **made,
        **{f"{name}:flops": 7 for name in made},
        "pid": os.getpid(),
        "checked:in": float(arguments["checks"]),
    }
