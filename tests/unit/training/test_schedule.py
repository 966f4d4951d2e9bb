"""What changes over the steps of a training is a function of the step: weights, biases, resuming."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BOUNDARY, Case, rank_batches
from torch import Tensor

from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Mesh
from moe_train.models.transformer import Transformer
from moe_train.parallel.engine import TorchEngine
from moe_train.training.optim import build_optimizer, learning_rate
from moe_train.training.schedule import settings_at
from moe_train.training.step import StepSettings, train_step

STEPS, SWITCH = 5, 3
CHANGING = Case(
    "changing",
    ("model.layers=1", "model.mtp.depth=1", "model.mtp.coef=0.5", "model.mtp.late_coef=0.125", "router.jitter=0.1",
     "model.mtp.late_after=0.6", "balance.loss_free.rate=0.125", "balance.loss_free.freeze_after=0.6",
     "optim.warmup_steps=2", f"train.steps={STEPS}"),
)  # fmt: skip
"""From step 3 of 5 on the loss ahead weighs less and the biases stay."""


def config_of(*overrides: str) -> TrainConfig:
    return Case("schedule", (*CHANGING.overrides, *overrides)).config()


def test_values_of_every_step() -> None:
    config = CHANGING.config()
    found = [settings_at(step, config, BOUNDARY) for step in range(STEPS)]
    assert [s.mtp_coef for s in found] == [0.5, 0.5, 0.5, 0.125, 0.125]
    assert [s.moves_biases for s in found] == [True, True, True, False, False]
    assert [s.learning_rate for s in found] == [learning_rate(step, STEPS, config.optim) for step in range(STEPS)]
    assert {(s.clip_norm, s.boundary_id) for s in found} == {(0.5, BOUNDARY)}
    assert len({s.seed for s in found}) == STEPS


@pytest.mark.parametrize(("late_after", "late"), [(0.0, 5), (0.2, 4), (0.676, 1), (0.8, 1), (0.81, 0), (1.0, 0)])
def test_the_late_weight_holds_for_the_last_steps(late_after: float, late: int) -> None:
    config = config_of(f"model.mtp.late_after={late_after}")
    weights = [settings_at(step, config, None).mtp_coef for step in range(STEPS)]
    assert weights == [0.5] * (STEPS - late) + [0.125] * late


def test_biases_never_move_without_loss_free_and_always_do_by_default() -> None:
    without = config_of("balance.loss_free=null")
    always = config_of("balance.loss_free.freeze_after=1.0")
    assert not any(settings_at(step, without, None).moves_biases for step in range(STEPS))
    assert all(settings_at(step, always, None).moves_biases for step in range(STEPS))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, STEPS - 1), max_size=12), st.integers(0, 3))
def test_what_was_asked_before_does_not_matter(asked: list[int], seed: int) -> None:
    config = CHANGING.config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    fresh = {step: settings_at(step, config, None) for step in range(STEPS)}
    assert [settings_at(step, config, None) for step in asked] == [fresh[step] for step in asked]


def test_seeds_differ_between_runs_and_steps() -> None:
    configs = [config_of(f"run.seed={seed}") for seed in (0, 1, 2)]
    seeds = [settings_at(step, config, None).seed for config, step in itertools.product(configs, range(STEPS))]
    assert len(set(seeds)) == len(seeds)


def start(mesh: Mesh) -> TorchEngine:
    model = CHANGING.whole_model()
    return TorchEngine(model, build_optimizer(model, CHANGING.config().optim), mesh)


def go_on(engine: TorchEngine, mesh: Mesh, steps: range) -> list[dict[str, Tensor]]:
    """Train; the biases after each step."""
    batches, biases = [*CHANGING.batches(), *CHANGING.batches()], []
    for step in steps:
        batch = batches[step]
        settings_now: StepSettings = settings_at(step, CHANGING.config(), BOUNDARY)
        train_step(engine, mesh, rank_batches(batch, 0, 1, 2), batch[0].numel(), settings_now)
        biases.append({name: bias_E.clone() for name, bias_E in engine.model.named_buffers()})
    return biases


def test_the_biases_stop_exactly_and_those_of_modules_too(lone_mesh: Mesh) -> None:
    engine = start(lone_mesh)
    biases = go_on(engine, lone_mesh, range(STEPS))
    assert set(biases[0]) == {"blocks.0.ffn.router.bias_E", "mtp.0.block.ffn.router.bias_E"}
    for name in biases[0]:
        moved = [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(biases)]
        assert moved == [True, True, False, False], name
        assert biases[0][name].any()


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(lone_mesh: Mesh) -> None:
    """Bit for bit, over the step at which both schedules switch."""
    whole, first, second = (start(lone_mesh) for _ in range(3))
    go_on(whole, lone_mesh, range(STEPS))
    go_on(first, lone_mesh, range(SWITCH))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    go_on(second, lone_mesh, range(SWITCH, STEPS))
    assert differing(whole.model, second.model) == []
    assert differing(whole.model, first.model) != []


def differing(a: Transformer, b: Transformer) -> list[str]:
    """Names of weights and biases that are not equal."""
    return [name for name, value in a.state_dict().items() if not torch.equal(value, b.state_dict()[name])]
