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
from moe_train.parallel.gradients import OwnGradients, SummedGradients
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
    gradients, ep, world_size = engine.gradients, mesh.layout.ep, mesh.layout.world_size
    engine.zero_grad()
    gradients.reduce()
    parameters = dict(engine.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad.fill_(mesh.ep_rank + 1.0 if ".experts." in name else 1.0)
    gradients.reduce()
    replicas = world_size // ep
    assert isinstance(gradients.experts, SummedGradients if replicas > 1 else OwnGradients)
    squared = 0.0
    for name, parameter in parameters.items():
        is_expert = ".experts." in name
        due = replicas * (mesh.ep_rank + 1) if is_expert else world_size
        assert (parameter.grad == due).all(), f"{name}: dense is summed over all ranks, experts over their replicas"
        places = [replicas * (place + 1) for place in range(ep)] if is_expert else [world_size]
        squared += parameter.numel() * sum(place**2 for place in places)
    assert gradients.norm().item() == pytest.approx(squared**0.5, rel=1e-13), "each expert counts once"


def check_passes(engine: TorchEngine, mesh: Mesh) -> None:
    """A gradient moves to its place in each pass, and a step forgets the one before."""
    tokens_BS = CASE.batches()[0][0][:2]
    found = []
    for passes in (1, 2, 1):
        engine.zero_grad()
        for number in range(passes):
            engine.backward(engine.model(tokens_BS).logits_BSV.square().mean(), is_last=number == passes - 1)
        engine.gradients.reduce()
        found.append({name: p.grad.clone() for name, p in engine.model.named_parameters()})
    once, twice, again = found
    for name, gradient in once.items():
        assert torch.allclose(twice[name], 2 * gradient, rtol=1e-12, atol=1e-18), name
        assert torch.allclose(again[name], gradient, rtol=1e-12, atol=1e-18), name
    assert once["embedding_VD"].any()


def check_refusal(engine: TorchEngine, mesh: Mesh) -> None:
    """One rank has a bad gradient: all refuse it, and nothing has changed anywhere."""
    before = {key: value.clone() for key, value in values_of(engine.parts()).items()}
    engine.zero_grad()
    if mesh.rank == 1:
        bad = next(p for name, p in engine.model.named_parameters() if ".experts." in name)
        bad.grad = torch.full_like(bad, float("nan"))
        if isinstance(engine.gradients.experts, SummedGradients):
            engine.gradients.experts.move(bad)
    with pytest.raises(NonFiniteGradientError):
        engine.step(RATE, CLIP_NORM)
    assert all(torch.equal(value, before[key]) for key, value in values_of(engine.parts()).items())


def check_and_train(world: World) -> dict[int, dict[str, Tensor]]:
    state = {}
    for ep in (1, 2, 4):
        mesh = build_mesh(world, ep)
        engine = engine_on(mesh)
        check_sums(engine, mesh)
        check_passes(engine, mesh)
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
