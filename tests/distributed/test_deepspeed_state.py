"""What one engine saved any other goes on from: at another stage, EP size and number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_samples import Trial, engine_on, train, whole
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.parallel.engine import Engine

pytestmark = pytest.mark.timeout(600)
KEYS = ("optim.router_lr_ratio=0.3", "model.ffn.balance.loss_free.rate=0.01")
BF16 = (*KEYS, "train.precision=bf16")
SAVED_AT, STEPS = 2, 4


def save(engine: Engine, world: World, mesh: Mesh, folder: Path) -> None:
    """The way of the training loop."""
    manager = CheckpointManager(folder, world, mesh.layout, keep=1)
    manager.save(SAVED_AT, CheckpointState(engine.parts(), {"step": SAVED_AT}, b""))


def load(engine: Engine, world: World, folder: Path) -> None:
    """The way of a resumed run."""
    parts = engine.parts()
    open_at(folder, world).fill(parts)
    engine.adopt(parts)


def first_life(world: World, trials: dict[str, Trial], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train half way, save, and go on to the end."""
    torch.set_num_threads(1)
    states = {}
    for name, trial in trials.items():
        mesh = build_mesh(world, trial.ep)
        engine = engine_on(world, mesh, trial)
        train(engine, mesh, trial, range(SAVED_AT))
        states[f"{name} saved"] = whole(engine.parts())
        save(engine, world, mesh, folder / name)
        train(engine, mesh, trial, range(SAVED_AT, STEPS))
        states[f"{name} end"] = whole(engine.parts())
    return states


def second_life(world: World, jobs: list[tuple[str, Trial]], folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """Start anew, load and go on to the end."""
    torch.set_num_threads(1)
    states = []
    for name, trial in jobs:
        mesh = build_mesh(world, trial.ep)
        engine = engine_on(world, mesh, trial)
        load(engine, world, folder / name)
        loaded = whole(engine.parts())
        used = {f"model.{key}": p.detach().float().clone() for key, p in engine.model.named_parameters()}
        train(engine, mesh, trial, range(SAVED_AT, STEPS))
        states.append({"loaded": loaded, "used": used, "end": whole(engine.parts())})
    return states


def both_lives(world: World, trials: dict[str, Trial], jobs: list[tuple[str, Trial]], folder: Path):
    """In the same processes."""
    return first_life(world, trials, folder), second_life(world, jobs, folder)


def unequal(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    assert found.keys() == truth.keys()
    return [
        key
        for key, b in truth.items()
        if not float((found[key].double() - b.double()).abs().max()) <= tolerance * max(1e-2, float(b.abs().max()))
    ]


def check(first, second, jobs, trials, tolerance: float) -> None:
    """What was loaded is what was saved, bit for bit; the end of the same layout too, of others within rounding."""
    for (name, trial), states in zip(jobs, second, strict=True):
        assert unequal(states["loaded"], first[f"{name} saved"]) == [], f"{name} -> {trial}: loaded"
        is_same = trial == trials[name]
        assert unequal(states["end"], first[f"{name} end"], 0.0 if is_same else tolerance) == [], f"{name} -> {trial}"


def test_every_engine_goes_on_from_every_other_on_two_ranks(tmp_path: Path) -> None:
    trials = {"torch": Trial(2, None, 1, KEYS), "zero1": Trial(2, 1, 1, KEYS), "zero2": Trial(1, 2, 2, KEYS)}
    jobs = [("torch", Trial(1, 1, 2, KEYS)), ("zero1", trials["torch"]), ("zero2", Trial(2, 0, 1, KEYS)),
            ("zero1", trials["zero1"]), ("zero2", trials["zero2"])]  # fmt: skip
    for first, second in run_ranks(both_lives, 2, trials, jobs, tmp_path, timeout_s=300):
        check(first, second, jobs, trials, 1e-5)
        for key, weights in second[0]["used"].items():  # of EP size 1, whose ranks have all experts
            assert torch.equal(weights, first["torch saved"][key]), f"the model does not compute with loaded {key}"


@pytest.mark.slow
def test_bf16_and_offloading_go_on_bit_for_bit_and_change_stage(tmp_path: Path) -> None:
    trials = {"bf16": Trial(2, 1, 2, BF16), "offload": Trial(2, 2, 2, KEYS, offload=True),
              "both": Trial(2, 1, 1, BF16, offload=True), "zero0": Trial(2, 0, 2, KEYS)}  # fmt: skip
    jobs = [*trials.items(), ("offload", Trial(1, 1, 1, KEYS)), ("zero0", Trial(1, None, 1, KEYS))]
    for first, second in run_ranks(both_lives, 2, trials, jobs, tmp_path, timeout_s=400):
        check(first, second, jobs, trials, 1e-5)


@pytest.mark.slow
def test_the_number_of_ranks_may_change_with_engine_and_stage(tmp_path: Path) -> None:
    trials = {"torch": Trial(4, None, 1, KEYS), "zero1": Trial(2, 1, 1, KEYS), "zero2": Trial(4, 2, 2, KEYS)}
    jobs = [("torch", Trial(2, 2, 1, KEYS)), ("zero1", Trial(1, 2, 2, KEYS)), ("zero2", Trial(2, None, 1, KEYS))]
    first = run_ranks(first_life, 4, trials, tmp_path, timeout_s=400)[0]
    for world_size in (1, 2):
        fitting = [(name, trial) for name, trial in jobs if trial.ep <= world_size]
        for second in run_ranks(second_life, world_size, fitting, tmp_path, timeout_s=400):
            check(first, second, fitting, trials, 1e-5)
    small = {"zero1": Trial(2, 1, 2, KEYS)}
    alone = run_ranks(first_life, 2, small, tmp_path / "small", timeout_s=400)[0]
    grown = [("zero1", Trial(4, 2, 1, KEYS)), ("zero1", Trial(2, None, 1, KEYS))]
    for second in run_ranks(second_life, 4, grown, tmp_path / "small", timeout_s=400):
        check(alone, second, grown, small, 1e-5)
