"""The exchange suite on a few ranks: what moves is what should, and a failure is told in the table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.benchmark.journeys import ways_of
from moe_train.benchmark.ranks import rank_environment, ranks
from moe_train.benchmark.results import finished
from moe_train.benchmark.suites import exchange
from moe_train.benchmark.suites.exchange import byte_note, run
from moe_train.benchmark.workers import WorkerError
from moe_train.config.bench import BenchConfig, ExchangeBench, Shape

SAMPLES = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])])}
SMALL = ExchangeBench(shapes=(Shape(experts=4, top_k=2, expert_dim=8),), tokens=32, dim=8, overlap=(1, 2))


def suite_of(**keys) -> BenchConfig:
    return BenchConfig(bench=SMALL.model_copy(update=keys), rounds=2, warmup=1, precision="fp32")


def check(result, num_rows: int, error: float) -> None:
    assert len(result.rows) == num_rows
    for row in result.rows:
        assert row.note == "" and row.times is not None and len(row.times.ms) == 2
        assert row.facts["bytes_per_token"] == row.facts["closed_form_bytes_per_token"] > 0
        assert row.facts["collectives"] > 0
        assert row.labels["work"] == "layer" or row.facts["error"] < error
        assert result.ratio_of(row) is not None


def test_two_ranks() -> None:
    check(finished(run(suite_of())), num_rows=2 * 2 * 2, error=1e-6)


@pytest.mark.slow
def test_four_ranks_in_two_nodes_with_layers_on_a_slow_network() -> None:
    keys = {"ranks": 4, "node_size": 2, "layer": True, "shared": True, "latency_ms": 5.0, "routing": ("zipf",)}
    result = finished(run(suite_of(**keys)))
    check(result, num_rows=3 * 2 * 2, error=1e-6)
    by_variant = {row.variant: row for row in result.rows if row.labels["work"] == "tokens only"}
    straight, through = by_variant["alltoall, 1 part"], by_variant["hierarchical, 1 part"]
    crossing = "between_nodes_bytes_per_token"
    assert through.facts[crossing] < straight.facts[crossing]
    # Each way out, home and back is at least one collective that is 5 ms late.
    assert all(min(row.times.ms) > 20.0 for row in result.rows if row.times)


def test_hierarchical_only_where_nodes_divide_the_ranks() -> None:
    def kinds(**keys) -> set[str]:
        return {way.kind for way in ways_of(SMALL.model_copy(update=keys))}

    assert kinds(ranks=4, node_size=2) == {"alltoall", "allgather", "hierarchical"}
    for keys in (
        {"ranks": 4},
        {"ranks": 4, "node_size": 1},
        {"ranks": 4, "node_size": 4},
        {"ranks": 4, "node_size": 3},
    ):
        assert kinds(**keys) == {"alltoall", "allgather"}


def test_bytes_that_differ_are_noted() -> None:
    facts = {"bytes_per_token": 30.0, "closed_form_bytes_per_token": 20.0}
    assert "1.500 times" in byte_note(facts)
    assert "should not" in byte_note({**facts, "closed_form_bytes_per_token": 0.0})
    assert byte_note({**facts, "bytes_per_token": 20.0}) == ""


def test_a_suite_whose_ranks_fail_says_so(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "BUILDER", "moe_train.benchmark.journeys:no_such_builder")
    result = finished(run(suite_of(ranks=1)))
    assert len(result.rows) == len(ways_of(SMALL)) and all(row.times is None for row in result.rows)
    assert all("no_such_builder" in row.note for row in result.rows)


def test_ranks_work_together() -> None:
    with ranks("rank_samples:summing", {}, 2, {**rank_environment(1), **SAMPLES}) as group:
        assert group.variants == ("sum",)
        assert group.facts_of("sum") == {"ranks": 2.0}
        assert group.timed("sum").run_ms() > 0.0
        assert group.timed("sum").run_ms() > 0.0


def test_the_rank_that_fails_is_named() -> None:
    starting = ranks("rank_samples:failing_on_rank_one", {}, 2, {**rank_environment(1), **SAMPLES})
    with pytest.raises(WorkerError, match=r"rank 1: .*no such table"), starting:
        pass
