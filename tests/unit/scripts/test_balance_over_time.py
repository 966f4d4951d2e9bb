"""The table and picture of how even the load became, from made-up runs with known figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[3] / "scripts" / "balance_over_time.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("balance_over_time", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, level: float) -> Path:
    """Forty steps; layer 3 is at its level, layer 1 falls from 40 x level by one level a step."""
    folder.mkdir()
    rows = [
        {"kind": "train", "step": step, "moe/layer_01/max_violation": (40 - step) * level,
         "moe/layer_03/max_violation": level}
        for step in range(1, 41)
    ]  # fmt: skip
    rows += [{"kind": "eval", "step": 40, "loss": 5.0 + level}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_figures_are_means_over_the_last_tenth_with_their_spread_over_seeds(script, tmp_path, capsys):
    one, three = write(tmp_path / "a", 1.0), write(tmp_path / "b", 3.0)
    script.main([str(tmp_path / "p.png"), f"both={one},{three}", f"alone={one}"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| | layer | step 5 | step 10 | step 20 | step 30 | step 40 |"
    # Steps 37 to 40 of layer 1: 3, 2, 1, 0 at level 1, three times that at level 3.
    assert shown[2].startswith("| both | 1 |") and shown[2].endswith("| 3.00 ± 2.12 |")
    assert shown[3] == "| both | 3 |" + " 2.00 ± 1.41 |" * 5
    assert shown[4].endswith("| 1.50 ± 0.00 |")
    assert shown[-2:] == ["both: held-out loss 7.000 ± 1.414", "alone: held-out loss 6.000 ± 0.000"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_runs_it_says_how_it_is_used(tmp_path):
    import subprocess

    ended = subprocess.run([sys.executable, PATH, str(tmp_path / "p.png")], capture_output=True, text=True)
    assert ended.returncode == 1 and "Usage:" in ended.stderr
