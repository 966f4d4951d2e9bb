"""The command moe_train.bench on tiny sizes: every variant that is installed runs, and its results can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import end_of, run, started

SECONDS = 240.0
SHAPE = "bench.shapes=[{experts: 4, top_k: 2, expert_dim: 32}]"
FEW = ["rounds=2", "warmup=1", "threads=1", "out=results"]
LAYER = ["bench=layer", SHAPE, "bench.tokens=128", "bench.dim=64", "bench.compile=[none]"]
MODEL = ["bench=model", SHAPE, "bench.layers=1", "bench.dim=64", "bench.heads=2", "bench.vocab_size=64",
         "bench.seq_len=32", "bench.batch=2"]  # fmt: skip


def results(overrides: list[str], folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Run the command; return the record's rows by case and variant, after a look at the table."""
    with started("bench", [*overrides, *FEW], folder) as command:  # its processes import large packages
        ended = end_of(command, SECONDS, status=0)
    record = json.loads((folder / "results" / f"{name}.json").read_text())
    table = (folder / "results" / f"{name}.md").read_text().splitlines()
    assert sum(line.startswith("| E=4") for line in table) == len(record["rows"])
    assert f"{name}.json" in ended.stdout
    for row in record["rows"]:
        assert row["labels"]["variant"] in ended.stdout.replace("\n", " ") or row["ms"] is not None
    return {
        " ".join((row["labels"].get("routing", ""), row["labels"]["variant"])).strip(): row for row in record["rows"]
    }


def check_times(row: dict[str, Any]) -> None:
    assert len(row["ms"]) == 2, row["note"]
    assert all(ms > 0 for ms in row["ms"])
    assert len(row["ratio"]["of_rounds"]) == 2


@pytest.mark.slow
def test_the_layer(tmp_path: Path) -> None:
    compute = "bench.compute=[auto,reference]"
    rows = results([*LAYER, compute, "bench.peers=[transformers_grouped_mm,deepspeed]"], tmp_path, "layer")
    ours = [f"ours {way}{what}" for way in ("auto", "reference") for what in ("", ", bf16 weights", ", routed ahead")]
    variants = ["dense", "dense, bf16 weights", *ours, "transformers_grouped_mm", "deepspeed"]
    assert list(rows) == [f"{routing} {variant}" for routing in ("balanced", "zipf") for variant in variants]
    for name, row in rows.items():
        check_times(row)
        if not name.endswith("routed ahead"):
            assert row["facts"]["error y"] < 0.02
            assert row["facts"]["error dx"] < 0.02
    assert rows["balanced dense"]["ratio"]["of_rounds"] == [1.0, 1.0]
    assert rows["zipf ours auto"]["facts"]["times deepspeed"] > 0
    assert {rows["zipf deepspeed"]["setting"], *rows["zipf deepspeed"]["other_settings"]} >= {"default", "tuned"}
    assert rows["zipf deepspeed"]["note"].startswith("deepspeed ")


@pytest.mark.slow
def test_the_model(tmp_path: Path) -> None:
    rows = results([*MODEL, "bench.peers=[transformers_eager]"], tmp_path, "model")
    assert list(rows) == ["dense none", "ours none", "transformers_eager"]
    for row in rows.values():
        check_times(row)
        assert row["facts"]["first loss"] == pytest.approx(4.16, abs=0.2), "ln 64: nothing is learned yet"
    assert rows["ours none"]["facts"]["parameters"] == rows["transformers_eager"]["facts"]["parameters"]


def test_mistakes_are_told_together(tmp_path: Path) -> None:
    ended = run("bench", [*MODEL, "bench.peers=[deepspeed]", "rounds=0"], tmp_path, status=2)
    assert "2 problems" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("results"))
