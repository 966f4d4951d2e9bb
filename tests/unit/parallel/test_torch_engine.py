"""The engine: clipping, refusal of bad gradients, and the names of its state."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from layouts import VOCAB, Case, rank_batches
from part_samples import values_of
from torch import Tensor
from waiting import NoWaiting

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.transformer import build_model
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.engine import NonFiniteGradientError, TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

CASE = Case("top-2")
RATE = 1e-2


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


def engine_on(mesh: Mesh, waits: bool | None = None) -> TorchEngine:
    config = CASE.config()
    exchange = exchange_for(mesh, config.model.ffn.num_experts, is_padded(config.model.ffn.capacity))
    model = CASE.prepare(build_model(config.model, VOCAB, exchange, "fp64", torch.device("cpu")))
    return TorchEngine(model, build_optimizer(model, config.optim), mesh, waits)


def filled(engine: TorchEngine, value: float) -> Iterator[Tensor]:
    """All gradients, with this value."""
    engine.zero_grad()
    engine.gradients.reduce()
    for parameter in engine.model.parameters():
        assert parameter.grad is not None
        yield parameter.grad.fill_(value)


def snapshot(engine: TorchEngine) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in values_of(engine.parts()).items()}


def train(engine: TorchEngine, mesh: Mesh, rank: int, size: int, clip_norm: float | None = 0.5) -> None:
    for batch in CASE.batches():
        train_step(
            engine, mesh, rank_batches(batch, rank, size, 1), batch[0].numel(), StepSettings(RATE, clip_norm, seed=0)
        )


@pytest.mark.parametrize(("clip_norm", "expected"), [(None, 3.0), (100.0, 3.0), (1.5, 1.5)])
def test_clipping(lone_mesh: Mesh, clip_norm: float | None, expected: float) -> None:
    engine = engine_on(lone_mesh)
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    assert len(list(filled(engine, 3.0 / count**0.5)))
    assert engine.step(RATE, clip_norm).item() == pytest.approx(3.0, rel=1e-12), "the norm before clipping"
    assert engine.gradients.norm().item() == pytest.approx(expected, rel=1e-6)


def test_the_rate_reaches_every_group(lone_mesh: Mesh) -> None:
    engine = engine_on(lone_mesh)
    before = snapshot(engine)
    assert len(list(filled(engine, 1.0)))
    engine.step(0.125, None)
    for name, parameter in engine.model.named_parameters():
        # The first step of AdamW on equal gradients: the rate itself, and the decay of matrices.
        decay = 0.1 if parameter.dim() > 1 else 0.0
        expected = before[f"model.{name}"] * (1 - 0.125 * decay) - 0.125
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-8), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(lone_mesh: Mesh, bad: float) -> None:
    engine = engine_on(lone_mesh)
    train(engine, lone_mesh, 0, 1)
    before = snapshot(engine)
    dict(engine.model.named_parameters())["blocks.0.ffn.experts.gate_up_LDF2"].grad.view(-1)[3] = bad
    with pytest.raises(NonFiniteGradientError, match=r"blocks\.0\.ffn\.experts\.gate_up_LDF2"):
        engine.step(RATE, 1.0)
    for key, value in values_of(engine.parts()).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("asks", ["step", "parts"])
def test_a_bad_gradient_changes_nothing_where_the_host_does_not_wait(lone_mesh: Mesh, bad: float, asks: str) -> None:
    """The device refuses the update; the host hears of it at the next occasion."""
    engine = engine_on(lone_mesh, waits=False)
    train(engine, lone_mesh, 0, 1)
    before = snapshot(engine)
    next(filled(engine, 1.0)).view(-1)[3] = bad
    engine.step(RATE, 1.0)
    with pytest.raises(NonFiniteGradientError, match="was not made"):
        engine.step(RATE, 1.0) if asks == "step" else engine.parts()
    for key, value in values_of(engine.parts()).items():
        assert torch.equal(value, before[key]), key


def test_the_host_need_not_wait_for_the_device(lone_mesh: Mesh) -> None:
    """Step after step, and with the same result."""
    waiting, going_on = engine_on(lone_mesh), engine_on(lone_mesh, waits=False)
    for engine in (waiting, going_on):
        for value in (1.0, 1e-9, 2.0):
            watch = NoWaiting() if engine is going_on else contextlib.nullcontext()
            assert len(list(filled(engine, value)))
            engine.settle()  # which on a device waits for the step before, not for this one
            with watch:
                engine.step(RATE, None)
    for key, value in values_of(going_on.parts()).items():
        assert torch.equal(value, values_of(waiting.parts())[key]), key


def test_state_has_the_same_keys_at_every_step(lone_mesh: Mesh) -> None:
    engine = engine_on(lone_mesh)
    keys = values_of(engine.parts()).keys()
    names = dict(engine.model.named_parameters()).keys()
    moments = {f"optim.{name}.{moment}" for name in names for moment in ("step", "exp_avg", "exp_avg_sq")}
    assert keys == {f"model.{name}" for name in names} | moments
    train(engine, lone_mesh, 0, 1)
    assert values_of(engine.parts()).keys() == keys


def test_filling_the_tensors_loads_the_state(lone_mesh: Mesh) -> None:
    trained, fresh = engine_on(lone_mesh), engine_on(lone_mesh)
    train(trained, lone_mesh, 0, 1)
    for key, value in values_of(fresh.parts()).items():
        value.copy_(values_of(trained.parts())[key])
    train(trained, lone_mesh, 0, 1)
    train(fresh, lone_mesh, 0, 1)
    for key, value in values_of(fresh.parts()).items():
        assert torch.equal(value, values_of(trained.parts())[key]), key


def test_the_ratio_of_a_group_multiplies_its_rate(lone_mesh: Mesh) -> None:
    engine = engine_on(lone_mesh)
    for group in engine.optimizer.param_groups:
        group["lr_ratio"] = 0.1 if group["name"] == "router" else 1.0
    train(engine, lone_mesh, 0, 1)
    rates = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
    assert rates == {"dense": RATE, "expert": RATE, "router": pytest.approx(0.1 * RATE)}
