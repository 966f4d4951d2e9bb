"""Tables and records: every single time is kept, a reader finds the ratios, and what is missing is told."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.benchmark.allocators import PRELOADED, TUNED, allocators, threads_of
from moe_train.benchmark.fleet import beside
from moe_train.benchmark.results import Row, SuiteResult
from moe_train.benchmark.table import as_console, as_markdown, as_record, number_text, write
from moe_train.benchmark.timing import Times
from moe_train.config.bench import BenchConfig

ROOT = Path(__file__).parents[3]


def row(variant: str, case: str, *ms: float, note: str = "", **facts: float) -> Row:
    return Row({"routing": case, "variant": variant}, Times(ms) if ms else None, facts, note)


RESULT = SuiteResult(
    "layer",
    "About this.",
    "dense",
    (
        row("dense", "even", 10.0, 20.0, 30.0),
        row("ours", "even", 20.0, 20.0, 60.0, error=0.001234),
        row("peer", "even", note="left out: [bench]"),
        row("dense", "zipf", 10.0, 10.0, 10.0),
        row("ours", "zipf", 5.0, 5.0, 5.0, error=0.5, bytes=1234567.0),
        row("other", "zipf", 1.0, 1.0, 1.0, note="left out: [bench]"),
    ),
)


def test_ratios_are_to_the_baseline_of_the_same_case() -> None:
    ratios = [RESULT.ratio_of(one) for one in RESULT.rows]
    assert [ratio and ratio.median for ratio in ratios] == [1.0, 0.5, None, 1.0, 2.0, 10.0]


def test_without_a_baseline_there_are_no_ratios() -> None:
    alone = SuiteResult("s", "a", "", RESULT.rows)
    assert [alone.ratio_of(one) for one in alone.rows] == [None] * 6
    assert "relative" not in as_markdown(alone)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_markdown_table() -> None:
    lines = as_markdown(RESULT).splitlines()
    assert lines[0] == "About this."
    table = [cells(line) for line in lines if line.startswith("|")]
    assert table[0] == ["routing", "variant", "median, ms", "speed relative to dense", "error", "bytes", "note"]
    assert set(map(len, table)) == {7}
    assert table[3] == ["even", "ours", "20.0", "0.50 (0.50 to 1.00)", "0.00123", "-", "-"]
    assert table[4] == ["even", "peer", "-", "-", "-", "-", "1"]
    assert table[6] == ["zipf", "ours", "5.0", "2.00 (2.00 to 2.00)", "0.5", "1,234,567", "-"]
    assert lines[-1] == "1. left out: [bench]"
    assert sum(line.startswith("1.") for line in lines) == 1, "equal notes share a number"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (7.0, "7"), (0.00123456, "0.00123"), (12345.6, "12,346"), (1e-9, "1e-09")]
)
def test_numbers(value: float, shown: str) -> None:
    assert number_text(value) == shown


@pytest.mark.parametrize("with_facts", [False, True])
def test_the_console_shows_every_row_under_its_case(with_facts: bool) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(as_console(RESULT, with_facts))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in ("even", "zipf", "dense", "0.50 (0.50 to 1.00)", "left out: [bench]"):
        assert text in shown
    assert ("1,234,567" in shown) == with_facts


def test_the_record_keeps_every_single_time_and_where_it_was_taken(tmp_path: Path) -> None:
    others = {"default": Times((9.0, 9.0, 9.0))}
    tuned = Row({"variant": "peer"}, Times((1.0, 2.0, 3.0)), {"bytes": 5.0}, "n", "tuned", others)
    config = BenchConfig(rounds=3, out=str(tmp_path))
    record_path, table_path = write(SuiteResult("layer", "a", "", (tuned,)), config, tmp_path / "new" / "folder")
    record = json.loads(record_path.read_text())
    (one,) = record["rows"]
    assert one["ms"] == [1.0, 2.0, 3.0]
    assert one["median_ms"] == 2.0
    assert one["other_settings"] == {"default": [9.0, 9.0, 9.0]}
    assert (one["setting"], one["facts"], one["note"], one["ratio"]) == ("tuned", {"bytes": 5.0}, "n", None)
    assert BenchConfig.model_validate(record["config"]) == config
    assert record["environment"]["packages"]["torch"]
    assert record["environment"]["cpu"]["cores"]
    assert "| peer | 2.0 | tuned | 5 | 1 |" in table_path.read_text()


def test_the_record_has_the_ratio_of_every_round() -> None:
    rows = as_record(RESULT, BenchConfig())["rows"]
    assert rows[1]["ratio"] == {"median": 0.5, "of_rounds": [0.5, 1.0, 0.5]}
    assert rows[2]["ms"] is None


def test_ours_are_compared_with_each_peer_round_by_round() -> None:
    rows = [row("ours a", "c", 1.0, 2.0), row("dense", "c", 1.0, 1.0), row("x", "c", 3.0, 2.0), row("gone", "c")]
    ours, dense, x, _ = beside(rows, "ours", ["x", "gone"])
    assert ours.facts == {"times x": 2.0}
    assert not dense.facts
    assert not x.facts


def test_allocators_are_as_the_launchers_set_them() -> None:
    settings = (ROOT / "launch" / "settings.sh").read_text()
    for name, value in TUNED.items():
        assert f"{name}={value}" in settings
    found = allocators()
    assert list(found)[:2] == ["default", "tuned"]
    assert set(found) <= {"default", "tuned", *PRELOADED}
    assert all(value is None for value in found["default"].values())
    assert found["tuned"].items() >= TUNED.items()
    assert found["tuned"]["LD_PRELOAD"] is None


def test_a_library_that_is_found_is_put_before_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so" if name == "tcmalloc" else None)
    found = allocators()
    assert list(found) == ["default", "tuned", "tcmalloc"]
    assert found["tcmalloc"]["LD_PRELOAD"] == "libtcmalloc.so"
    assert found["tcmalloc"]["MALLOC_TOP_PAD_"] is None


def test_threads() -> None:
    assert threads_of(3) == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    assert int(threads_of(None)["OMP_NUM_THREADS"]) >= 1
