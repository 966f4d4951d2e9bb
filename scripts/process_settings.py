"""Measures what the settings of a process are worth: the same training under each, one after the other in each round.

Usage: python scripts/process_settings.py [--ranks 1] [--rounds 3] [--steps 12] [--ways none memory ...]
    [KEY=VALUE ...]  (ways: none memory hugepages bound)

Each way is `python -m moe_train.train` (torchrun for several ranks) with its variables and no others of them. The ratio
is the median over the rounds of the ratio within a round of the median step to that of the first way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_train.config.process import MALLOC, OFF, SWITCH, THREADS, threads_per_rank

WARM_UP = 4
"""Steps of a run that do not count."""
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
BOUND = {"OMP_PROC_BIND": "true"}
WAYS = {
    "none": {},
    "memory": MALLOC,
    "hugepages": MALLOC | HUGE,
    "bound": MALLOC | BOUND,
}


def step_ms(name: str, ranks: int, steps: int, folder: Path, keys: list[str]) -> float:
    """Train anew and return the median step after the warm-up, in ms."""
    shutil.rmtree(folder, ignore_errors=True)
    own = [f"run.dir={folder}", f"train.steps={steps}", "log.every=1", "checkpoint.every=0", "eval.every=0"]
    own += ["log.wandb.mode=disabled", "data.heldout_fraction=0", "sample.max_tokens=1", "optim.warmup_steps=1", *keys]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    others = {*MALLOC, *HUGE, *BOUND, THREADS}
    kept = {key: value for key, value in os.environ.items() if key not in others}
    variables = kept | WAYS[name] | {SWITCH: OFF, THREADS: str(threads_per_rank(ranks))}
    words = [sys.executable, "-m", *launcher, "moe_train.train", *own]
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the training under {name!r} ended with {done.returncode}:\n{done.stderr}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train" and record["step"] > WARM_UP]
    return float(statistics.median(record["step_ms"] for record in records))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What the settings of a process are worth.")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("keys", nargs="*", help="KEY=VALUE for all")
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in given.ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            first = turn % len(given.ways)
            for name in given.ways[first:] + given.ways[:first]:
                times[name].append(step_ms(name, given.ranks, given.steps, Path(folder) / "run", given.keys))
    reference = times[given.ways[0]]
    print("| settings | ms per step, median (range) | relative, median (range) |\n|---|---|---|")
    for name, found in times.items():
        ratios = sorted(ms / first for ms, first in zip(found, reference, strict=True))
        print(
            f"| {name} | {statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f}) "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()
