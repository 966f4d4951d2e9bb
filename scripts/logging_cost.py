"""Measures what logging costs: steps that are all recorded, by every sink, against steps of which none is.

Usage: python scripts/logging_cost.py [--rounds 8] [--steps 5] [KEY=VALUE ...]

One process trains one model; blocks of ``--steps`` steps take turns: recorded by console, metrics.jsonl and wandb
(offline) with every figure of every layer, and not recorded. The ratio is the median over the rounds of the ratio
within a round of the median step. On a busy machine that ratio says little: the last column is the time of the record
itself over that of its own step, and what a record makes later steps wait for is not in it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.dist.world import world_from_environment
from moe_train.interop.start import load_first_weights
from moe_train.observe.sinks import RunContext, SinkGroup
from moe_train.observe.sinks.console import ConsoleSink
from moe_train.observe.sinks.jsonl import JsonlSink
from moe_train.observe.sinks.wandb import WandbSink
from moe_train.training.loop import Window, next_batches, train_record
from moe_train.training.schedule import settings_at
from moe_train.training.setup import Run, build_run
from moe_train.training.signals import StopRequest
from moe_train.training.step import train_step

WARM_UP = 2
"""Blocks of each kind that do not count."""


class Trainer:
    """Steps of a run, recorded or not, one after the other.

    Args:
        run: what is trained.
        sinks: started.
    """

    def __init__(self, run: Run, sinks: SinkGroup) -> None:
        self.run, self.sinks, self.step = run, sinks, 0

    def block_ms(self, steps: int, is_recorded: bool) -> tuple[float, float]:
        """Return the median step of a block, and the median of what of it is the record, in ms."""
        found = [self.step_ms(Window(), is_recorded) for _ in range(steps)]
        return statistics.median(whole for whole, _ in found), statistics.median(record for _, record in found)

    def step_ms(self, window: Window, is_recorded: bool) -> tuple[float, float]:
        """Train one step; return its time and that of its record, in ms."""
        run, start_s = self.run, time.perf_counter()
        with StopRequest() as stop:
            batches, size, _ = next_batches(run, stop, window)
        settings = settings_at(self.step, run.config, run.texts.tokenizer.boundary_id)
        result = train_step(run.engine, run.mesh, batches, size.targets, settings, size.tokens)
        self.step += 1
        window.steps, window.tokens = 1, size.tokens
        trained_s = time.perf_counter()
        if is_recorded:
            self.sinks.write(train_record(run, self.step, settings.learning_rate, size.targets, result, window))
        end_s = time.perf_counter()
        return (end_s - start_s) * 1e3, (end_s - trained_s) * 1e3


def measured(trainer: Trainer, rounds: int, steps: int) -> list[tuple[float, float, float]]:
    """Return, of each round, the median steps that are not and that are recorded, and the record's share, in ms."""
    found = []
    for turn in range(-WARM_UP, rounds):
        blocks = {}
        for is_recorded in (False, True) if turn % 2 else (True, False):
            blocks[is_recorded] = trainer.block_ms(steps, is_recorded)
        if turn >= 0:
            found.append((blocks[False][0], blocks[True][0], blocks[True][1]))
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What logging costs.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("keys", nargs="*", help="KEY=VALUE")
    given = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    with tempfile.TemporaryDirectory() as folder:
        total = 2 * (given.rounds + WARM_UP) * given.steps
        own = [f"run.dir={folder}", f"train.steps={total}", "log.every=1", "log.wandb.mode=offline"]
        config = compose_config("train", TrainConfig, train_problems, [*own, *given.keys])
        with world_from_environment(config.parallel.timeout_s) as world:
            run = build_run(config, world, load_first_weights)
            sinks = SinkGroup([ConsoleSink(io.StringIO()), JsonlSink(), WandbSink("offline")])
            sinks.start(RunContext(Path(folder), config, 0))
            with sinks:
                rounds = measured(Trainer(run, sinks), given.rounds, given.steps)
                names = ", ".join(sinks.names)
    plain, recorded, records = (sorted(column) for column in zip(*rounds, strict=True))
    shares = sorted(record / logged for _, logged, record in rounds)
    ratios = sorted(logged / alone for alone, logged, _ in rounds)
    print(f"sinks: {names}\n")
    print("| steps | ms, median (range) | relative, median (range) | record, ms | share |\n|---|---|---|---|---|")
    print(f"| not recorded | {spread(plain, '.1f')} | 1 | 0 | 0 |")
    cells = [spread(recorded, ".1f"), spread(ratios, ".3f"), spread(records, ".2f"), spread(shares, ".2%")]
    print(f"| recorded | {' | '.join(cells)} |")


def spread(values: list[float], form: str) -> str:
    """Return median and range."""
    return f"{statistics.median(values):{form}} ({values[0]:{form}} to {values[-1]:{form}})"


if __name__ == "__main__":
    main()
