"""The engine on four ranks: sums over the right groups, a norm that counts once, replicas that stay equal."""

import pytest
import torch
from layouts import VOCAB, Case, rank_batches
from part_samples import values_of
from spawn import run_ranks
from torch import Tensor

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.transformer import build_model
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.engine import NonFiniteGradientError, TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

CASE = Case("top-2")
RATE, CLIP_NORM = 1e-2, 0.5


def engine_on(mesh: Mesh) -> TorchEngine:
    config = CASE.config()
    exchange = exchange_for(mesh, config.model.ffn.num_experts, is_padded(config.model.ffn.capacity))
    model = CASE.prepare(build_model(config.model, VOCAB, exchange, "fp64", torch.device("cpu")))
    return TorchEngine(model, build_optimizer(model, config.optim), mesh)


def check_sums(engine: TorchEngine, mesh: Mesh) -> None:
    """Gradients of ones for what is dense, and of the rank's place for experts, have sums in closed form."""
    buffers, ep, world_size = engine.gradients, mesh.layout.ep, mesh.layout.world_size
    buffers.dense.fill_(1.0)
    buffers.experts.fill_(mesh.ep_rank + 1.0)
    buffers.reduce()
    replicas = world_size // ep
    assert (buffers.dense == world_size).all(), "dense: summed over all ranks"
    assert (buffers.experts == replicas * (mesh.ep_rank + 1)).all(), "experts: summed over their replicas only"
    squared = buffers.dense.numel() * world_size**2
    squared += sum(buffers.experts.numel() * (replicas * (place + 1)) ** 2 for place in range(ep))
    assert buffers.norm().item() == pytest.approx(squared**0.5, rel=1e-14), "each expert counts once"


def check_refusal(engine: TorchEngine, mesh: Mesh) -> None:
    """One rank has a bad gradient: all refuse it, and nothing has changed anywhere."""
    before = {key: value.clone() for key, value in values_of(engine.parts()).items()}
    engine.zero_grad()
    if mesh.rank == 1:
        engine.gradients.experts[0] = float("nan")
    with pytest.raises(NonFiniteGradientError):
        engine.step(RATE, CLIP_NORM)
    assert all(torch.equal(value, before[key]) for key, value in values_of(engine.parts()).items())


def check_and_train(world: World) -> dict[int, dict[str, Tensor]]:
    state = {}
    for ep in (1, 2, 4):
        mesh = build_mesh(world, ep)
        engine = engine_on(mesh)
        check_sums(engine, mesh)
        for batch in CASE.batches():
            batches = rank_batches(batch, world.rank, world.size, 1)
            train_step(engine, mesh, batches, batch[0].numel(), StepSettings(RATE, CLIP_NORM, seed=0))
        check_refusal(engine, mesh)
        state[ep] = dict(values_of(engine.parts()))
    return state


def test_four_ranks() -> None:
    states = run_ranks(check_and_train, 4)
    for ep, first in states[0].items():
        for rank in range(1, 4):
            for key, value in states[rank][ep].items():
                holder = rank % ep if ".experts." in key else 0
                expected = first[key] if holder == 0 else states[holder][ep][key]
                assert torch.equal(value, expected), f"ep {ep}: {key} of rank {rank} has drifted from its replica"
