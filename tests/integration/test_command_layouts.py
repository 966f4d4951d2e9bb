"""The layout contract through the command line: one training on one rank, two ranks, and two that share experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import checkpoint_path, records, run, tensors_of

STEPS = 12
LAYOUTS = {
    "one rank, two micro-batches": (1, ["train.micro_batch=4"]),
    "two ranks": (2, []),
    "two ranks that share the experts": (2, ["parallel.ep=2"]),
}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("layouts")
    settings = [*tiny, f"train.steps={STEPS}", "train.precision=fp64", "eval.every=5", "eval.batches=1"]
    for index, (ranks, overrides) in enumerate(LAYOUTS.values()):
        run("train", [*settings, *overrides, f"run.dir=layout{index}"], folder, ranks)
    return {name: folder / f"layout{index}" for index, name in enumerate(LAYOUTS)}


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-10 * max(1.0, abs(b))


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_every_layout_trains_alike(runs: Runs, name: str) -> None:
    """Equal losses of every step, the first at equal weights, are equal batches in equal order."""
    truth, found = records(next(iter(runs.values())), "train"), records(runs[name], "train")
    assert [row["step"] for row in found] == [row["step"] for row in truth] == list(range(1, STEPS + 1))
    for a, b in zip(found, truth, strict=True):
        for key in ("loss", "aux_loss", "z_loss", "grad_norm", "lr"):
            assert close(a[key], b[key]), f"{key} of step {a['step']}: {a[key]} is not {b[key]}"
        assert (a["tokens"], a["moe/layer_01/load"]) == (b["tokens"], b["moe/layer_01/load"])
    assert len({row["loss"] for row in truth}) == STEPS


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_the_final_evaluation_is_that_of_every_layout(runs: Runs, name: str) -> None:
    truth, found = records(next(iter(runs.values())), "eval")[-1], records(runs[name], "eval")[-1]
    assert found["step"] == truth["step"] == STEPS
    assert found["eval_tokens"] == truth["eval_tokens"]
    assert close(found["loss"], truth["loss"]) and close(found["bits_per_byte"], truth["bits_per_byte"])


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_checkpoints_hold_the_same_position_and_state(runs: Runs, name: str) -> None:
    paths = [checkpoint_path(run_dir, STEPS) for run_dir in (runs[name], next(iter(runs.values())))]
    position, truth = (json.loads((path / "trainer.json").read_text())["loader"] for path in paths)
    assert position == truth and position["samples"] == STEPS * 8
    found, wanted = (tensors_of(path) for path in paths)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 1e-9 * tensor.abs().max().clamp(min=1e-2), key
