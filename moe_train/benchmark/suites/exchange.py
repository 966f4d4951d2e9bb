"""Tokens to their experts and home, by each kind of exchange, whole and in parts; bytes against the closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_train.benchmark.journeys import Way, ways_of
from moe_train.benchmark.layer_case import shape_label
from moe_train.benchmark.ranks import Group, rank_environment, ranks
from moe_train.benchmark.results import VARIANT, Row, SuiteResult, growing
from moe_train.benchmark.timing import Times, VariantError, interleave
from moe_train.benchmark.workers import WorkerError
from moe_train.config.bench import BenchConfig, ExchangeBench, Shape

BUILDER = "moe_train.benchmark.journeys:build"


def run(config: BenchConfig) -> Iterator[SuiteResult]:
    """Time every exchange at every shape, each shape's in turn; yield what is known after each shape."""
    bench = config.bench
    assert isinstance(bench, ExchangeBench), "the door chooses the suite by its kind"
    ways = ways_of(bench)
    timed = (rows_of(config, bench, index, ways) for index in range(len(bench.shapes)))
    late = f", every collective {bench.latency_ms:g} ms late" if bench.latency_ms else ""
    about = (
        f"Forward and backward of {bench.tokens} tokens per rank, D={bench.dim}, {config.precision}, on {bench.ranks} "
        f"processes of one thread (gloo){late}. A pass lasts until the slowest rank is done; bytes are those to other "
        "ranks, of all ranks, per token of theirs."
    )
    yield from growing("exchange", about, ways[0].variant, timed)


def rows_of(config: BenchConfig, bench: ExchangeBench, index: int, ways: list[Way]) -> list[Row]:
    """Return the rows of one shape; if its ranks fail, rows that say so."""
    shape = bench.shapes[index]
    arguments = {"config": config.model_dump(mode="json"), "shape": index}
    try:
        with ranks(BUILDER, arguments, bench.ranks, rank_environment(1)) as group:
            times = interleave({way.name: group.timed(way.name) for way in ways}, config.rounds, config.warmup)
            return [row_of(shape, way, group, times[way.name]) for way in ways]
    except (WorkerError, VariantError) as error:
        return [Row(labels_of(shape, way), None, {}, f"failed: {error}") for way in ways]


def row_of(shape: Shape, way: Way, group: Group, times: Times) -> Row:
    """Return the row of one variant."""
    facts = group.facts_of(way.name)
    return Row(labels_of(shape, way), times, facts, byte_note(facts))


def labels_of(shape: Shape, way: Way) -> dict[str, str]:
    """Return which row it is."""
    return {"shape": shape_label(shape), "routing": way.routing, "work": way.work, VARIANT: way.variant}


def byte_note(facts: dict[str, float]) -> str:
    """Return what to say when an exchange does not move what it should: nothing else about it counts then."""
    moved, closed = facts["bytes_per_token"], facts["closed_form_bytes_per_token"]
    if math.isclose(moved, closed, rel_tol=1e-12):
        return ""
    return f"moves {moved / closed:.3f} times the bytes of the closed form" if closed else "moves bytes, and should not"
