"""What a training step leaves behind is in its checkpoint, whole, and any layout takes it up (trap 33)."""

from pathlib import Path

import pytest
import torch
from layout_cases import ON_ALL_LAYOUTS, PLAIN
from layouts import RATES, VOCAB, Case, gathered, rank_batches
from spawn import run_ranks

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.engine import TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

BIASED = Case("loss-free bias", ("router.kind=sigmoid", "balance.loss_free.rate=0.25"))
COUPLED = [case for case in ON_ALL_LAYOUTS if case not in PLAIN]
"""Experts that a graph couples: networks, and whole blocks."""


def engine_on(world: World, mesh: Mesh, case: Case) -> TorchEngine:
    config = case.config()
    exchange = exchange_for(mesh, config.model.ffn.num_experts, padded=False)
    model = case.prepare(build_model(config.model, VOCAB, exchange, "fp64", world.device))
    return TorchEngine(model, build_optimizer(model, config.optim), mesh)


def whole_state(engine: TorchEngine, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Weights, both moments and biases, experts of all ranks together."""
    state = {f"model.{k}": v for k, v in gathered(engine.model, mesh, lambda p: p).items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        found = gathered(engine.model, mesh, lambda p, moment=moment: engine.optimizer.state[p][moment])
        state |= {f"{moment}.{k}": v for k, v in found.items()}
    return state | {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


def step(engine: TorchEngine, mesh: Mesh, world: World, case: Case, number: int) -> None:
    batch = case.batches()[number]
    micro_batches = rank_batches(batch, world.rank, world.size, 1)
    train_step(engine, mesh, micro_batches, batch[1].numel(), StepSettings(RATES[number], 0.5, seed=0))


def save_at_ep_4_and_load_everywhere(world: World, folder: Path, cases: list[Case]) -> dict[tuple[str, int], list[str]]:
    """What is not as it was saved, and what differs after one more step, by case and EP size."""
    torch.set_num_threads(1)
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4)}
    wrong = {}
    for number, case in enumerate(cases):
        engine, mesh = engine_on(world, meshes[4], case), meshes[4]
        step(engine, mesh, world, case, 0)
        state = CheckpointState(engine.parts(), {"step": 1}, None)
        path = CheckpointManager(folder / f"{number}", world, mesh.layout, keep=1).save(1, state)
        truth = whole_state(engine, mesh)
        assert any(name.endswith("router.bias_E") and value.any() for name, value in truth.items()) == (
            case is cases[0]
        )
        step(engine, mesh, world, case, 1)
        later = whole_state(engine, mesh)
        for ep, mesh in meshes.items():
            engine = engine_on(world, mesh, case)
            open_at(path, world).fill(engine.parts())
            found = whole_state(engine, mesh)
            wrong[case.name, ep] = [name for name in truth if not torch.equal(found[name], truth[name])]
            step(engine, mesh, world, case, 1)
            found = whole_state(engine, mesh)
            wrong[case.name, ep] += [name for name in later if not torch.allclose(found[name], later[name], 1e-9, 1e-9)]
    return wrong


@pytest.mark.slow
def test_trap_33_weights_moments_and_biases_saved_at_ep_4_load_at_ep_1_2_and_4(tmp_path: Path) -> None:
    cases = [BIASED, *COUPLED]
    assert [case.config().model.ffn.graph.expert for case in COUPLED] == ["ffn", "block"]
    for wrong in run_ranks(save_at_ep_4_and_load_everywhere, 4, tmp_path, cases):
        assert wrong == {(case.name, ep): [] for case in cases for ep in (1, 2, 4)}
