"""A whole training step beside other people's: forward, loss, backward, gradient norm, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from moe_train.benchmark.allocators import allocators, threads_of
from moe_train.benchmark.fleet import Fleet, Program, beside
from moe_train.benchmark.layer_case import shape_label
from moe_train.benchmark.model_case import ModelCase
from moe_train.benchmark.peers.registry import MODELS, programs
from moe_train.benchmark.results import Row, SuiteResult, growing
from moe_train.config.bench import BenchConfig, ModelBench, Shape

DENSE: Final = "dense"
ABOUT: Final = (
    "One optimizer step on random tokens, as the trainer makes it: forward, cross-entropy, backward, gradient "
    "norm and clipping, AdamW; the learning rate is so small that the routing of the first weights stays. `dense` "
    "is this project's model with SwiGLU networks of equal active FLOPs (hidden width K·F); `ours` and it keep "
    "fp32 weights and moments. The last word of their names is train.compile."
)


def run(config: BenchConfig, step: str) -> Iterator[SuiteResult]:
    """Time every shape; yield what is known after each.

    Args:
        config: of the command.
        step: ``module:function`` that builds this project's training step from ``case``, ``is_dense`` and ``compile``
            and names it ``step``; it knows the trainer, which benchmarks do not import.
    """
    bench = config.bench
    assert isinstance(bench, ModelBench), "the door chooses the suite by its kind"
    tuned = {"tuned": allocators()["tuned"]}
    ours = [
        Program(f"{kind} {way}", step, {"is_dense": kind == DENSE, "compile": way, "name": f"{kind} {way}"}, tuned)
        for kind in (DENSE, "ours")
        for way in bench.compile
    ]
    with Fleet([*ours, *programs(MODELS, bench.peers)], threads_of(config.threads), config.timeout_s) as fleet:
        timed = (rows_of(fleet, config, bench, shape) for shape in bench.shapes)
        yield from growing("model", ABOUT, f"{DENSE} {bench.compile[0]}", timed)


def rows_of(fleet: Fleet, config: BenchConfig, bench: ModelBench, shape: Shape) -> list[Row]:
    """Time one shape."""
    case = ModelCase.of(config, bench, shape)
    found = fleet.time({"case": case.arguments()}, config.rounds, config.warmup)
    rows = beside((row for one in found for row in one.rows({"shape": shape_label(shape)})), "ours", MODELS)
    return [with_speed(row, case.tokens) for row in rows]


def with_speed(row: Row, tokens: int) -> Row:
    """Return a row with its tokens per second."""
    if row.times is None:
        return row
    return replace(row, facts={"tokens/s": tokens / row.times.median_ms * 1e3, **row.facts})
