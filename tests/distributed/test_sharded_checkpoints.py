"""What one layout saved, any other takes up exactly, on fewer ranks and on more, sharded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import RATES, Case, gathered, rank_batches, torch_engine
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.parallel.engine import TorchEngine
from moe_train.training.step import StepSettings, train_step

CASES = [
    Case("loss-free bias, a module ahead",
         ("router.kind=sigmoid", "balance.loss_free.rate=0.25", "model.layers=1", "model.mtp.depth=1")),
    Case("graph of blocks", ("model=graph_block_tiny", "model.layers=1")),
]  # fmt: skip
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2), (4, 2)]}
"""(ep, dp_shard) by world size."""


def whole_state(engine: TorchEngine, mesh: Mesh) -> dict[str, Tensor]:
    """Weights, moments, numbers of steps and biases, experts of all ranks together."""
    state = {f"model.{k}": v for k, v in gathered(engine.model, mesh, lambda p: p).items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        found = gathered(engine.model, mesh, lambda p, moment=moment: engine.optimizer.state[p][moment])
        state |= {f"{moment}.{k}": v for k, v in found.items()}
    for name, parameter in engine.model.named_parameters():
        state[f"step.{name}"] = engine.optimizer.state[parameter]["step"].clone()
    return state | {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


def step(engine: TorchEngine, mesh: Mesh, case: Case, number: int) -> None:
    batch = case.batches()[number]
    micro_batches = rank_batches(batch, mesh.rank, mesh.layout.world_size, 1)
    settings = StepSettings(RATES[number], 0.5, seed=0, mtp_coef=0.3)
    train_step(engine, mesh, micro_batches, batch[1].numel(), settings)


def save(world: World, mesh: Mesh, engine: TorchEngine, folder: Path) -> None:
    CheckpointManager(folder, world, mesh.layout, keep=1).save(1, CheckpointState(engine.parts(), {"step": 1}, None))


def saved_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*/step_*") if path.is_dir())


def load_all_and_save(world: World, folder: Path, later: list[dict[str, Tensor]] | None) -> object:
    """Load all there is on every layout, go on from it, save it again; on an empty folder train the first step.

    Returns what was not as the first to save had it, and what differs after one more step, by what and where; and the
    state after that step.
    """
    torch.set_num_threads(1)
    wrong: dict[str, list[str]] = {}
    states = []
    for number, case in enumerate(CASES):
        home = folder / f"{number}"
        before = [path for path in saved_in(folder) if path.is_relative_to(home)]
        world.barrier()
        for ep, dp_shard in LAYOUTS[world.size]:
            mesh = build_mesh(world, ep, dp_shard)
            key = f"{case.name} on {world.size} ranks, {ep} x {dp_shard}"
            if not before:
                engine = torch_engine(mesh, case, "fp64")
                step(engine, mesh, case, 0)
                if world.is_leader:
                    torch.save(whole_state(engine, mesh), folder / f"truth{number}")
            truth = torch.load(folder / f"truth{number}")
            for path in before:
                engine = torch_engine(mesh, case, "fp64")
                parts = engine.parts()
                open_at(path, world).fill(parts)
                engine.adopt(parts)
                found = whole_state(engine, mesh)
                wrong[f"{path.parent.parent.name}/{path.parent.name}: {key}"] = [
                    name for name in truth.keys() | found.keys() if not torch.equal(found[name], truth[name])
                ]
            save(world, mesh, engine, home / f"{len(before)}_{world.size}_{ep}_{dp_shard}")
            step(engine, mesh, case, 1)
            states.append(whole_state(engine, mesh))
            first = states[-1] if later is None else later[number]
            wrong[f"after a step: {key}"] = [
                name for name, value in first.items() if not torch.allclose(states[-1][name], value, 1e-9, 1e-9)
            ]
    return wrong, states


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_takes_up_what_every_other_saved(tmp_path: Path) -> None:
    ((wrong, states),) = run_ranks(load_all_and_save, 1, tmp_path, None)
    assert not any(wrong.values())
    loaded = []
    for size in (2, 4, 1):  # a larger world, a larger one still, and back
        for wrong, _ in run_ranks(load_all_and_save, size, tmp_path, states, timeout_s=240):
            assert {key: names for key, names in wrong.items() if names} == {}
        loaded.append(sum("after a step" not in key for key in wrong) // len(CASES))
    assert loaded == [2 * 1, 3 * 3, 1 * 6], "each layout loads all that was there"
