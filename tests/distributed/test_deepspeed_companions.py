"""DeepSpeed with what else changes how a step is run: recomputed activations, and experts that move between ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_samples import Trial, distances, engine_on, outcome, train, whole
from spawn import run_ranks

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World
from moe_train.moe.roles import give_experts
from moe_train.training.placement import Decision, Places, Rebalancer

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
KEYS = ("optim.router_lr_ratio=0.3",)
TRUTH = Trial(overrides=KEYS)
PLACES = (2, 0, 3, 1)
"""The expert at each place: every one moves, one of each rank to the other."""


def moving(world: World, trial: Trial, folder: Path) -> list[str]:
    """What is wrong after experts changed places by way of a checkpoint: in the state, or in the model's weights."""
    mesh = build_mesh(world, trial.ep)
    engine = engine_on(world, mesh, trial)
    train(engine, mesh, trial, range(2))
    saved = whole(engine.parts())
    manager = CheckpointManager(folder, world, mesh.layout, keep=1)
    manager.save(2, CheckpointState(engine.parts(), {"step": 2}, b""))
    rebalancer = Rebalancer(engine, mesh)
    places = {name: Places((1, 1, 1, 1), (0, 1, 2, 3), PLACES, 2) for name in rebalancer.layers}
    here = PLACES[2 * mesh.ep_rank : 2 * mesh.ep_rank + 2]
    for layer in rebalancer.layers.values():
        give_experts(layer.experts, here)
    parts = engine.parts()
    open_at(folder, world).fill(rebalancer.arrived(parts, Decision(places, starts_anew=True)), partial=True)
    engine.adopt(parts)
    state = whole(engine.parts())
    wrong = [f"{trial.stage}: state of {key}" for key in saved if not torch.equal(state[key], saved[key])]
    held = {name: p for name, p in engine.model.named_parameters() if ".experts." in name}
    assert len(held) == 4
    expected = {name: saved[f"model.{name}"][list(here)] for name in held}
    return wrong + [f"{trial.stage}: {name}" for name in held if not torch.equal(held[name], expected[name])]


def all_of_it(world: World, folder: Path) -> list[str]:
    """What differs from torch's engine with experts at fixed places that keeps its activations."""
    torch.set_num_threads(1)
    truth = outcome(world, TRUTH)
    wrong = []
    for stage in (0, 1, 2):
        wrong += moving(world, Trial(2, stage, 2, KEYS), folder / f"{stage}")
        for mode in ("selective", "full"):
            found = outcome(world, Trial(2, stage, 2, (*KEYS, f"parallel.remat={mode}")))
            wrong += [f"{mode}, {stage}: {key}" for key, error in distances(found, truth).items() if not error <= 1e-5]
    return wrong


def test_recomputed_activations_and_moving_experts_change_nothing(tmp_path: Path) -> None:
    assert run_ranks(all_of_it, 2, tmp_path, timeout_s=500) == [[], []]
