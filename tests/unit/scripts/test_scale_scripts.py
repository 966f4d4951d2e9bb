"""The tools behind the figures on scaling out print what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Layout
from moe_train.parallel.memory import memory_per_rank

ROOT = Path(__file__).resolve().parents[3]


def rows_of(script: str, *arguments: str) -> list[list[str]]:
    """The cells of every table that a script prints, headings included."""
    words = [sys.executable, ROOT / "scripts" / f"{script}.py", *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_layout_memory_is_the_closed_form() -> None:
    headings, first, second = rows_of("layout_memory", "olmoe_1b_7b", "8:8:1", "8:8:8")
    model = compose_config("train", TrainConfig, lambda config: [], ["model=olmoe_1b_7b"]).model
    for row, layout in ((first, Layout(8, 8)), (second, Layout(8, 8, 8))):
        memory = memory_per_rank(model, 50304, layout, "bf16")
        assert row[:3] == [str(layout.world_size), str(layout.ep), str(layout.dp_shard)]
        assert float(row[headings.index("sum, GiB")]) == pytest.approx(
            (memory.state_bytes + memory.gathered_bytes) / 2**30, abs=0.01
        )


@pytest.mark.slow
def test_remat_cost_compares_every_mode() -> None:
    small = ["--models", "dense_tiny", "--tokens", "512", "--repeats", "1"]
    _, *rows = rows_of("remat_cost", *small)
    assert [row[1] for row in rows] == ["none", "selective", "full"]
    assert float(rows[1][-1]) < 1.0 and float(rows[2][-1]) < 1.0, "of the peak memory"
