"""The same global batch on one process with many threads and on several with fewer: what sharding experts costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from moe_train.benchmark.allocators import num_cores
from moe_train.benchmark.layer_case import shape_label
from moe_train.benchmark.model_case import ModelCase
from moe_train.benchmark.ranks import Group, rank_environment, ranks
from moe_train.benchmark.results import VARIANT, Row, SuiteResult, growing
from moe_train.benchmark.suites.exchange import byte_note
from moe_train.benchmark.timing import Times, VariantError, interleave
from moe_train.benchmark.whole_step import EXCHANGE_MS, STEP
from moe_train.benchmark.workers import WorkerError
from moe_train.config.bench import BenchConfig, ClusterBench, Shape


def run(config: BenchConfig, step: str) -> Iterator[SuiteResult]:
    """Time the step on each number of processes, all those of one model in turn; yield what is known after each model.

    Args:
        config: of the command.
        step: ``module:function``, `moe_train.benchmark.whole_step.build` with the trainer, which benchmarks do not
            import.
    """
    bench = config.bench
    assert isinstance(bench, ClusterBench), "the door chooses the suite by its kind"
    cases = product(bench.shapes, bench.compile)
    timed = (rows_of(config, bench, step, shape, compiled) for shape, compiled in cases)
    about = (
        f"A whole training step of {bench.batch} sequences of {bench.seq_len} tokens ({bench.layers} layers, "
        f"D={bench.dim}, {config.precision}) on the same {cores_of(config)} core(s): one process with as many threads, "
        "and several that share cores and experts. A step lasts until the slowest rank is done; exchange_ms is what "
        "that rank waits for, slower ranks included which waits longest; loss is that of the first step."
    )
    yield from growing("cluster", about, variant_of(1, cores_of(config)), timed)


def cores_of(config: BenchConfig) -> int:
    """Return the threads of all processes together."""
    return config.threads or num_cores()


def variant_of(size: int, cores: int) -> str:
    """Return how tables name so many processes."""
    threads = max(1, cores // size)
    told = f"{size} process{'es' if size > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{told}, EP={size}" if size > 1 else told


def sizes_of(bench: ClusterBench) -> list[int]:
    """Return the numbers of processes, one first: the others are compared with it."""
    return list(dict.fromkeys((1, *bench.ranks)))


def rows_of(config: BenchConfig, bench: ClusterBench, step: str, shape: Shape, compiled: str) -> list[Row]:
    """Return the rows of one model; if ranks fail, rows that say so."""
    cores, sizes = cores_of(config), sizes_of(bench)
    case = {"shape": shape_label(shape), "compile": compiled}
    labels = {size: {**case, VARIANT: variant_of(size, cores)} for size in sizes}
    try:
        arguments = {"case": ModelCase.of(config, bench, shape).arguments(), "compile": compiled}
        with groups(step, arguments, sizes, cores) as started:
            times = interleave(
                {str(n): group.timed(STEP) for n, group in started.items()}, config.rounds, config.warmup
            )
            exchanges = {size: group.timed(EXCHANGE_MS).run_ms() for size, group in started.items()}
            return [row_of(labels[n], group, times[str(n)], exchanges[n]) for n, group in started.items()]
    except (WorkerError, VariantError) as error:
        return [Row(labels[size], None, {}, f"failed: {error}") for size in sizes]


@contextlib.contextmanager
def groups(step: str, arguments: Mapping[str, Any], sizes: list[int], cores: int) -> Iterator[Mapping[int, Group]]:
    """Start ranks for each number of processes, one group after the other."""
    with contextlib.ExitStack() as stack:
        yield {
            size: stack.enter_context(ranks(step, arguments, size, rank_environment(max(1, cores // size))))
            for size in sizes
        }


def row_of(labels: Mapping[str, str], group: Group, times: Times, exchange_ms: float) -> Row:
    """Return the row of one number of processes."""
    facts = {**group.facts, "exchange_ms": exchange_ms}
    return Row(labels, times, facts, byte_note(facts))
