"""The tools behind the figures on speed print what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import TINY

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "names", "arguments"),
    [
        ("logging_cost", ["not recorded", "recorded"], ["--rounds", "1", "--steps", "2"]),
        ("process_settings", ["none", "memory"], ["--ways", "none", "memory", "--rounds", "1", "--steps", "6"]),
    ],
)
def test_a_table_with_a_line_for_each_way(script: str, names: list[str], arguments: list[str], tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("Whatever is said often enough.\n\n" * 600)
    data = ["data=text", f"data.path={text}", f"data.cache_dir={tmp_path}/cache", "tokenizer=bytes"]
    own = [key for key in TINY if not key.startswith(("log.", "checkpoint.", "eval."))]
    keys = [*own, *data] if script == "logging_cost" else [*(k for k in own if "heldout" not in k), *data]
    keys = [key for key in keys if not key.startswith("sample.")]
    words = [sys.executable, ROOT / "scripts" / f"{script}.py", *arguments, *keys]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == names
    assert all(float(row[1].split()[0]) > 0.0 for row in rows[2:])
    assert len({len(row) for row in rows}) == 1
