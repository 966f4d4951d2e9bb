"""The routing study, tiny: the sweep, a variant by hand, the table that both fill, and what a second start leaves."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import Ended, records, run, run_words
from moe_train.config.groups import options_of

pytestmark = pytest.mark.slow
STEPS = 4
SWEPT = ["topk", "capacity_position"]
OF_OTHERS = ("graph_", "silent_", "dense_", "sparse_", "heads_", "depth_", "scale_", "sentiment_")
"""Beginnings of the other studies' variants."""
VARIANTS = [name for name in options_of("study") if not name.startswith(OF_OTHERS)]
CAPACITY = {variant for variant in VARIANTS if variant.startswith("capacity_")}


@dataclass(frozen=True)
class Swept:
    """A study of which a part was swept, twice, after one variant had been run by hand."""

    folder: Path
    first: Ended
    trained: dict[str, int]
    table: str
    second: Ended


def trained(folder: Path) -> dict[str, int]:
    """The number of train records of each run."""
    return {path.name: len(records(path, "train")) for path in sorted(folder.glob("runs/routing_study-*"))}


@pytest.fixture(scope="module")
def swept(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("study")
    settings = ["experiment=routing_study", *tiny, f"train.steps={STEPS}"]
    by_hand = ["hydra.mode=RUN", "study=gshard", "run.seed=1", "run.name=routing_study-gshard-seed_1"]
    run("train", [*settings, *by_hand], folder)
    sweep = [*settings, f'hydra.sweeper.params.study="{",".join(SWEPT)}"']
    first = run("train", sweep, folder)
    counts, table = trained(folder), (folder / "runs/routing_study/table.md").read_text()
    return Swept(folder, first, counts, table, run("train", sweep, folder))


def lines_of(table: str) -> dict[str, list[str]]:
    """The cells of each variant."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    return {row[0].split("`")[1]: row[1:] for row in rows}


def test_the_sweep_trains_each_variant_with_each_seed(swept: Swept) -> None:
    by_sweep = {f"routing_study-study_{variant}-seed_{seed}" for variant in SWEPT for seed in range(3)}
    assert set(swept.trained) == by_sweep | {"routing_study-gshard-seed_1"}
    assert set(swept.trained.values()) == {STEPS}


def test_the_sweep_ends_with_table_and_picture(swept: Swept) -> None:
    assert "table.md" in swept.first.stdout.splitlines()[-2] and "picture.png" in swept.first.stdout.splitlines()[-1]
    assert (swept.folder / "runs/routing_study/picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_joins_what_was_swept_and_what_was_run_by_hand(swept: Swept) -> None:
    lines = lines_of(swept.table)
    assert {variant: cells[0] for variant, cells in lines.items()} == {
        "topk": "3",
        "gshard": "1",
        "capacity_position": "3",
    }
    assert lines["topk"][5].startswith("0.00%") and not lines["capacity_position"][5].startswith("0.00%")


def test_each_line_is_of_the_last_evaluations(swept: Swept) -> None:
    runs = [swept.folder / f"runs/routing_study-study_topk-seed_{seed}" for seed in range(3)]
    losses = [records(path, "eval")[-1]["loss"] for path in runs]
    assert len(set(losses)) == 3, "the seeds differ"
    assert lines_of(swept.table)["topk"][3].startswith(f"{sum(losses) / 3:.4f} ± ")


def test_a_finished_run_is_not_trained_again(swept: Swept) -> None:
    assert trained(swept.folder) == swept.trained
    assert (swept.folder / "runs/routing_study/table.md").read_text() == swept.table
    assert swept.second.stdout.count(f"resumed at step {STEPS}") == 3 * len(SWEPT)


@pytest.mark.timeout(1200)
def test_every_variant_trains_and_has_its_line(tiny: list[str], tmp_path: Path) -> None:
    everything = f'hydra.sweeper.params.study="{",".join(VARIANTS)}"'
    sweep = ["experiment=routing_study_more", *tiny, "train.steps=2", everything]
    run_words([sys.executable, "-m", "moe_train.train", *sweep], tmp_path, {}, timeout_s=1000.0)
    lines = lines_of((tmp_path / "runs/routing_study/table.md").read_text())
    assert sorted(lines) == VARIANTS
    assert all(cells[0] == "1" and "-" not in cells[3:] for cells in lines.values())
    dropped = {variant: float(cells[5].rstrip("%")) for variant, cells in lines.items()}
    assert {variant for variant, percent in dropped.items() if percent > 0} == CAPACITY
    assert dropped["capacity_reroute"] < min(dropped[variant] for variant in CAPACITY - {"capacity_reroute"}) / 5
