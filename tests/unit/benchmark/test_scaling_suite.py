"""The scaling suite: which points a curve has, what is relative to what, and all of it on tiny layers."""

from __future__ import annotations

import pytest

from moe_train.benchmark.curves import CURVES, Point, middle_of, points_of, shape_of
from moe_train.benchmark.results import finished
from moe_train.benchmark.suites.scaling import REFERENCE, RELATIVE, X, row_of, rows_of, run
from moe_train.benchmark.timing import Times
from moe_train.config.bench import BenchConfig, ScalingBench

SMALL = ScalingBench(
    experts=(4, 8), tokens=(32, 64, 128), seq_lens=(16, 32), eps=(1, 2), top_k=2, expert_dim=16, dim=64
)
CONFIG = BenchConfig(bench=SMALL, rounds=2, warmup=1, threads=1)


def test_whole_blocks_and_ranks() -> None:
    bench = SMALL.model_copy(update={"eps": (2,)})
    rows = [row for curve in ("length", "ep") for row in rows_of(CONFIG, bench, curve)]
    assert [(row.variant, row.note) for row in rows] == [("S=16", ""), ("S=32", ""), ("EP=2", "")]
    assert all(row.times is not None and row.facts[RELATIVE] > 0.0 for row in rows)


@pytest.mark.slow
def test_every_curve_on_tiny_layers() -> None:
    result = finished(run(CONFIG))
    assert [row.variant for row in result.rows] == [
        "E=4",
        "E=8",
        "T=32",
        "T=64",
        "T=128",
        "S=16",
        "S=32",
        "EP=1",
        "EP=2",
    ]
    for row in result.rows:
        assert row.times is not None and len(row.times.ms) == 2, row.note
        assert row.facts[X] > 0.0 and row.facts[RELATIVE] > 0.0
    references = [row.variant for row in result.rows if row.facts[REFERENCE]]
    assert references == ["E=4", "T=64", "S=16", "EP=1"]
    assert [row.facts[RELATIVE] for row in result.rows if row.facts[REFERENCE]] == [1.0] * 4


def test_points_have_equal_tokens_where_something_else_grows() -> None:
    bench = ScalingBench()
    assert middle_of(bench.tokens) == 4096
    for curve in ("experts", "length", "ep"):
        assert {point.tokens for point in points_of(bench, curve)} == {4096}
    assert [point.tokens for point in points_of(bench, "tokens")] == list(bench.tokens)
    assert [shape_of(bench, point).experts for point in points_of(bench, "experts")] == list(bench.experts)
    assert {shape_of(bench, point).experts for point in points_of(bench, "tokens")} == {8}


def test_a_length_that_does_not_divide_keeps_whole_sequences() -> None:
    bench = SMALL.model_copy(update={"seq_lens": (24, 100)})
    assert [(point.tokens, point.length) for point in points_of(bench, "length")] == [(48, 24), (100, 100)]


def test_a_curve_without_points_is_left_out() -> None:
    bench = SMALL.model_copy(update={"eps": (), "seq_lens": ()})
    assert rows_of(CONFIG, bench, "ep") == rows_of(CONFIG, bench, "length") == []
    assert set(CURVES) == {"experts", "tokens", "length", "ep"}


@pytest.mark.parametrize(
    ("ms", "note"), [((8.0, 16.0, 8.0), ""), ((8.0, 8.0, 8.0), ""), ((9.6, 9.6, 9.6), "more than")]
)
def test_cost_per_token_is_compared_within_a_round(ms, note) -> None:
    # Four times the tokens in four times the time, in a slow round as in the others.
    reference, point = Point("tokens", 100, 100, 100), Point("tokens", 400, 400, 400)
    row = row_of(point, Times(ms), reference, Times(tuple(2.0 if a != 16.0 else 4.0 for a in ms)))
    assert row.facts[RELATIVE] == pytest.approx(1.2 if note else 1.0)
    assert row.note.startswith(note) and bool(row.note) == bool(note)
    assert row.facts["µs per token"] == pytest.approx(sorted(ms)[1] / 400 * 1e3)


def test_only_tokens_are_meant_to_be_linear() -> None:
    points = [Point("experts", 8, 100, 100), Point("experts", 128, 100, 100)]
    assert row_of(points[1], Times((3.0,)), points[0], Times((1.0,))).note == ""
