"""``python -m moe_train.bench bench=layer|model|exchange|cluster|scaling``: time variants beside each other."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.bench")  # before anything slow is imported: it may start this process anew

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.bench import BenchConfig
from moe_train.config.bench_rules import bench_problems
from moe_train.config.door import door

if TYPE_CHECKING:
    from moe_train.benchmark.model_case import ModelCase
    from moe_train.benchmark.results import SuiteResult
    from moe_train.benchmark.timing import Timed
    from moe_train.config.schema import TrainConfig
    from moe_train.data.loader import Batch
    from moe_train.dist.mesh import Mesh
    from moe_train.dist.world import World
    from moe_train.models.transformer import Transformer
    from moe_train.parallel.engine import Engine

WIDE = 180
"""Columns of a terminal that has room for more than times."""
LIFELONG = contextlib.ExitStack()
"""What a process of its own holds to its end."""
STEP = "moe_train.bench:training_step"
"""Builds this project's whole training step in a process of its own; benchmarks do not know the trainer."""

RANK_STEP = "moe_train.bench:rank_step"
"""Builds one rank's share of it."""


@door("bench", BenchConfig, bench_problems)
def main(config: BenchConfig) -> None:
    """Time a suite, print its table and write SUITE.json and SUITE.md."""
    from rich.console import Console

    from moe_train.benchmark.table import as_console, write

    for result in measured(config):  # what is known is on disk after each case
        record, table = write(result, config, Path(config.out).expanduser())
    console = Console()
    console.print(as_console(result, with_facts=console.width >= WIDE))
    print(f"every single time: {record}\ntable: {table}")  # noqa: T201


def measured(config: BenchConfig) -> Iterator[SuiteResult]:
    """Run the suite that the configuration names; yield what is known after each case."""
    from moe_train.benchmark.suites import cluster, exchange, layer, model, scaling

    match config.bench.kind:
        case "layer":
            return layer.run(config)
        case "model":
            return model.run(config, STEP)
        case "exchange":
            return exchange.run(config)
        case "cluster":
            return cluster.run(config, RANK_STEP)
        case "scaling":
            return scaling.run(config)


def training_step(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build a training step as the trainer makes it, on one process.

    Args:
        arguments: ``case`` (a `ModelCase`), ``is_dense`` for its dense twin, ``compile``, and ``name`` of the variant.

    Returns:
        The variant, and facts: ``first loss``, ``parameters``, ``GFLOP``.
    """
    from moe_train.benchmark.model_case import ModelCase
    from moe_train.benchmark.timing import Here

    case, name = ModelCase.parse(arguments["case"]), arguments["name"]
    config = case.training(arguments["is_dense"], arguments["compile"])
    mesh, engine = alone(config, case.vocab_size)
    step = stepping(config, case, mesh, engine)
    return {
        name: Here(step),
        f"{name}:first loss": step(),
        f"{name}:parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        f"{name}:GFLOP": case.gflop(arguments["is_dense"]),
    }


def alone(config: TrainConfig, vocab_size: int) -> tuple[Mesh, Engine]:
    """Build model and optimizer in a world of this process."""
    return on_ranks(config, own_world(config.parallel.timeout_s), vocab_size)


def on_ranks(config: TrainConfig, world: World, vocab_size: int) -> tuple[Mesh, Engine]:
    """Build model and optimizer as the trainer does. Collective."""
    from moe_train.dist.mesh import build_mesh
    from moe_train.models.exchange import model_exchange
    from moe_train.parallel.build import build_engine
    from moe_train.training.optim import build_optimizer

    mesh = build_mesh(world, config.parallel.ep)
    exchange = model_exchange(mesh, config.model, config.parallel)
    make_optimizer = functools.partial(build_optimizer, config=config.optim)
    return mesh, build_engine(config, mesh, world, exchange, vocab_size, make_optimizer, None)


@functools.cache
def own_world(timeout_s: float) -> World:
    """Return the world of this process alone; it lasts as long as the process."""
    import torch
    from torch._C._distributed_c10d import HashStore

    from moe_train.dist.world import World, joined

    return LIFELONG.enter_context(joined(HashStore(), World(0, 1, torch.device("cpu"), timeout_s)))


def stepping(config: TrainConfig, case: ModelCase, mesh: Mesh, engine: Engine) -> Callable[[], float]:
    """Return the trainer's step on one batch, which returns its loss in nats per token."""
    from moe_train.benchmark.model_case import draw_tokens
    from moe_train.data.loader import Batch
    from moe_train.training.schedule import settings_at
    from moe_train.training.step import train_step

    batch, settings = Batch(*draw_tokens(case), first_sequence=0), settings_at(0, config, None)

    def step() -> float:
        loss_sum = train_step(engine, mesh, [batch], case.tokens, settings).tally.loss_sum
        assert loss_sum is not None, "a step has a micro-batch"
        return float(loss_sum) / case.tokens

    return step


def rank_step(arguments: dict[str, Any]) -> Mapping[str, Timed | float]:
    """Build one rank's share of a training step as the trainer makes it; takes what `whole_step.build` takes."""
    from moe_train.benchmark.whole_step import build

    return build(arguments, share_of_step)


def share_of_step(
    config: TrainConfig, world: World, batch: Batch, vocab_size: int
) -> tuple[Transformer, Callable[[], object]]:
    """Return a model on the ranks, and the trainer's step on this rank's rows of the global batch. Collective."""
    from moe_train.training.schedule import settings_at
    from moe_train.training.step import train_step

    mesh, engine = on_ranks(config, world, vocab_size)
    tokens, settings = config.train.global_batch * config.data.seq_len, settings_at(0, config, None)
    return engine.model, lambda: train_step(engine, mesh, [batch], tokens, settings)


if __name__ == "__main__":
    main()
