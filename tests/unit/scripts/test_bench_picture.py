"""The picture of the scaling suite, from a record with known figures that the bench itself has written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.benchmark.curves import CURVES, Point, points_of
from moe_train.benchmark.results import SuiteResult
from moe_train.benchmark.suites.scaling import failed_row, row_of
from moe_train.benchmark.table import write
from moe_train.benchmark.timing import Times
from moe_train.config.bench import BenchConfig, ScalingBench

PATH = Path(__file__).parents[3] / "scripts" / "bench_picture.py"
BENCH = ScalingBench(experts=(8, 16, 32), tokens=(1024, 2048, 4096), seq_lens=(128, 256), eps=(1, 2))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_picture", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def times_of(point: Point) -> Times:
    """A millisecond per 1,024 tokens, in the second round twice as much; tenfold for the length of 256."""
    base_ms = point.tokens / 1024 * (10.0 if point.length == 256 else 1.0) / (point.x if point.curve == "ep" else 1)
    return Times((base_ms, 2.0 * base_ms, base_ms))


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    rows = []
    for curve in CURVES:
        points = points_of(BENCH, curve)
        reference = points[0] if curve == "ep" else points[(len(points) - 1) // 2]
        rows += [row_of(point, times_of(point), reference, times_of(reference)) for point in points]
    rows.append(failed_row(Point("experts", 64, 2048, 2048), "out of memory"))
    folder = tmp_path_factory.mktemp("bench")
    return write(SuiteResult("scaling", "", "", tuple(rows)), BenchConfig(bench=BENCH), folder)[0]


def test_points_are_quotients_within_a_round(script, record) -> None:
    curves = script.curves_of(json.loads(record.read_text()))
    assert {name: [point.x for point in points] for name, points in curves.items()} == {
        "experts": [8.0, 16.0, 32.0],
        "tokens": [1024.0, 2048.0, 4096.0],
        "length": [128.0, 256.0],
        "ep": [1.0, 2.0],
    }
    flat, steep = [(1.0,) * 3] * 3, [(1.0,) * 3, (10.0,) * 3]
    assert [point.costs for point in curves["experts"]] == [point.costs for point in curves["tokens"]] == flat
    assert [point.costs for point in curves["length"]] == steep
    assert [point.median for point in curves["ep"]] == [1.0, 0.5]
    assert [[point.x for point in points if point.is_reference] for points in curves.values()] == [
        [16.0], [2048.0], [128.0], [1.0]
    ]  # fmt: skip


def test_the_picture_is_drawn(record, tmp_path) -> None:
    picture = tmp_path / "scaling.png"
    subprocess.run([sys.executable, PATH, record, picture], check=True, env={"PYTHONPATH": str(PATH.parents[1])})
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_curves_that_were_not_measured_are_left_out(script, record, tmp_path) -> None:
    told = json.loads(record.read_text())
    told["rows"] = [row for row in told["rows"] if row["labels"]["curve"] != "ep"]
    curves = script.curves_of(told)
    assert set(curves) == {"experts", "tokens", "length"}
    script.draw(curves, tmp_path / "three.png")
    assert (tmp_path / "three.png").exists()
