"""The graph study, tiny: a sweep over the four kinds at one size, and the tables that it ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch import records, run_words

pytestmark = pytest.mark.slow
KINDS = ("graph", "silent", "dense", "sparse")
STEPS = 4


def cells_of(table: str) -> dict[str, list[str]]:
    """The cells of each line of the tables by its first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.timeout(600)
def test_a_sweep_ends_with_paired_differences(tiny: list[str], tmp_path: Path) -> None:
    swept = f'hydra.sweeper.params.study="{",".join(f"{kind}_e2" for kind in KINDS)}"'
    words = [sys.executable, "-m", "moe_train.train", "experiment=graph_study", *tiny, f"train.steps={STEPS}", swept]
    ended = run_words(words, tmp_path, {}, timeout_s=500.0)
    folders = {
        kind: [tmp_path / f"runs/graph_study-study_{kind}_e2-seed_{seed}" for seed in range(3)] for kind in KINDS
    }
    assert {len(records(folder, "train")) for found in folders.values() for folder in found} == {STEPS}
    losses = {kind: [records(folder, "eval")[-1]["loss"] for folder in found] for kind, found in folders.items()}
    lines = cells_of((tmp_path / "runs/graph_study/table.md").read_text())
    for place, kind in enumerate(KINDS[1:]):
        differences = [own - other for own, other in zip(losses["graph"], losses[kind], strict=True)]
        assert lines["e2"][place].startswith(f"{sum(differences) / 3:+.4f} ± ")
    assert all(lines[f"{kind}_e2"][0] == "3" and lines[f"{kind}_e2"][2] != "-" for kind in KINDS)
    assert [lines[f"{kind}_e2"][5] != "-" for kind in KINDS] == [True, True, False, False], "similarity of experts"
    assert [lines[f"{kind}_e2"][6] != "-" for kind in KINDS] == [True, False, False, False], "messages"
    assert "picture.png" in ended.stdout.splitlines()[-1]
