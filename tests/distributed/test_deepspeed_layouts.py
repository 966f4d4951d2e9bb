"""DeepSpeed equals torch's engine: losses, gradient norms, weights and moments, at every stage and layout in fp32."""

from __future__ import annotations

import pytest
import torch
from deepspeed_samples import CASE, RATES, Trained, Trial, distances, engine_on, outcomes, train
from layout_cases import CASES, HEADS
from layouts import rank_batches
from spawn import run_ranks

from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World
from moe_train.parallel.engine import NonFiniteGradientError
from moe_train.training.step import StepSettings, train_step

pytestmark = pytest.mark.timeout(600)
ROUTERS = ("optim.router_lr_ratio=0.3",)
BF16 = (*ROUTERS, "train.precision=bf16")
TRUTH = Trial(overrides=ROUTERS)
NAMES = {case.name: case for case in CASES}
HARD = [
    next(case for case in CASES if case.name.startswith(start))
    for start in ("all tokens to one expert for good", "DeepSeek-V3", "gpt-oss", "two modules ahead, dense")
] + HEADS[:1]
"""Experts without tokens, ranks without tokens, a moving bias, parameters used twice, tiny groups, no experts, and two
kinds of them in different numbers."""


def on(world_size: int, truth: Trial, trials: list[Trial]) -> tuple[Trained, list[tuple[Trial, Trained]]]:
    """The truth on so many ranks, by torch's engine, and each trial on each rank."""
    results = run_ranks(outcomes, world_size, [truth, *trials], timeout_s=500)
    return results[0][0], [(t, found) for of_rank in results for t, found in zip(trials, of_rank[1:], strict=True)]


def check_equal(world_size: int, truth: Trial, trials: list[Trial], tolerance: float = 1e-5) -> None:
    true, found_by = on(world_size, truth, trials)
    assert min(true.norms) > (truth.config.train.clip_norm or 0.0), "nothing was clipped"
    for trial, found in found_by:
        wrong = {key: error for key, error in distances(found, true).items() if not error <= tolerance}
        assert wrong == {}, trial
        assert found.norms == next(other.norms for t, other in found_by if t == trial), "ranks have different norms"
        steps = {float(value) for key, value in found.state.items() if key.endswith(".step")}
        assert steps == {float(len(RATES))}


def test_every_stage_equals_torch_on_two_ranks_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    trials = [Trial(2, stage, 2, ROUTERS) for stage in (0, 1, 2)]
    check_equal(2, TRUTH, [*trials, Trial(1, 1, 1, ROUTERS), Trial(2, 1, 2, ROUTERS, offload=True)])
    assert "".join(capfd.readouterr()) == "", "DeepSpeed likes to talk"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_and_ep_size_equals_torch(world_size: int) -> None:
    sizes = [ep for ep in (1, 2, 4) if ep <= world_size]
    trials = [Trial(ep, stage, m, ROUTERS) for ep in sizes for stage in (0, 1, 2) for m in (1, 2)]
    check_equal(world_size, TRUTH, [*trials, *(Trial(sizes[-1], stage, 2, ROUTERS, offload=True) for stage in (1, 2))])


@pytest.mark.slow
@pytest.mark.parametrize("case", HARD, ids=str)
def test_every_stage_equals_torch_on_hard_cases(case) -> None:
    # With a small eps Adam makes a step of every gradient, also of one that is nothing but rounding: some of these
    # cases then move torch's own norm by 3e-5 from one layout to another.
    keys = (*ROUTERS, "train.clip_norm=0.01", "optim.eps=1e-2")
    ep = 4 if case.config().model.ffn.num_experts else 1
    check_equal(
        4,
        Trial(1, None, 1, keys, case),
        [Trial(ep, None, 2, keys, case)] + [Trial(ep, s, 2, keys, case) for s in (0, 1, 2)],
    )


@pytest.mark.slow
def test_without_clipping() -> None:
    """DeepSpeed clips at a norm of 1 when nothing is said."""
    keys = ("train.clip_norm=null",)
    check_equal(2, Trial(2, overrides=keys), [Trial(2, stage, 1, keys) for stage in (0, 1, 2)])


def test_bf16_is_as_close_to_fp32_as_torch_in_bf16_with_masters_and_sums_in_fp32() -> None:
    """Router and norms see rounded weights, so the numbers are not torch's; but they are not much further from fp32.

    (How far both are from each other says little: one token that takes another way moves either.)
    """
    keys = (*BF16, "model.ffn.balance.loss_free.rate=0.001")
    exact = Trial(overrides=(*ROUTERS, "model.ffn.balance.loss_free.rate=0.001"))
    torchs = Trial(overrides=keys)
    trials = [Trial(2, 1, 1, keys), Trial(1, 2, 4, keys), Trial(2, 2, 2, keys, offload=True)]
    truth, found_by = on(2, exact, [torchs, *trials])
    in_bf16 = found_by[0][1]
    allowed = worst(distances(in_bf16, truth))
    for trial, found in (pair for pair in found_by if pair[0] != torchs):
        errors = worst(distances(found, truth))
        assert {key for key, error in errors.items() if not error < 1.5 * allowed[key]} == set(), trial
        assert all(values.dtype is torch.float32 for values in found.state.values()), "masters, moments and biases"
        assert {values.dtype for values in found.weights.values()} == {torch.bfloat16}
        masters = found.state["model.embedding_VD"]
        assert torch.equal(masters.bfloat16(), found.weights["embedding_VD"])
        assert not torch.equal(masters.bfloat16().float(), masters), "masters have lost what bf16 cannot hold"


def worst(errors: dict[str, float]) -> dict[str, float]:
    """Of losses, of norms, and of all weights."""
    weights = max(e for key, e in errors.items() if key.startswith("model.") and not key.endswith("bias_E"))
    return {"loss": errors["loss"], "norm": errors["norm"], "weights": weights}


def refuse(world: World, trial: Trial) -> dict[str, bool]:
    """One rank has a bad loss: all refuse, nothing has changed, and the next step is what it would have been."""
    mesh = build_mesh(world, trial.ep)
    engine = engine_on(world, mesh, trial)
    train(engine, mesh, trial, range(1))
    before = {key: [box.values.clone() for box in part.boxes] for key, part in engine.parts().items()}
    weights = [p.detach().clone() for p in engine.model.parameters()]
    micro_batches = rank_batches(CASE.batches()[1], mesh.rank, world.size, trial.accumulation)
    for place, batch in enumerate(micro_batches):
        loss = engine.model(batch.tokens_BS).logits_BSV.square().mean()
        is_bad = mesh.rank == world.size - 1 and place == 0
        engine.backward(loss * float("nan") if is_bad else loss, is_last=place == len(micro_batches) - 1)
    with pytest.raises(NonFiniteGradientError):
        engine.step(RATES[1], trial.config.train.clip_norm)
    after = {key: [box.values for box in part.boxes] for key, part in engine.parts().items()}
    same = all(torch.equal(a, b) for key in before for a, b in zip(before[key], after[key], strict=True))
    same &= all(torch.equal(a, b) for a, b in zip(weights, engine.model.parameters(), strict=True))
    _, refused = train(engine, mesh, trial, range(1, 2))
    smooth = engine_on(world, mesh, trial)
    _, norms = train(smooth, mesh, trial, range(2))
    with pytest.raises(AssertionError, match="was built to clip at"):
        train_step(engine, mesh, micro_batches, 96, StepSettings(RATES[2], 123.0, seed=0))
    return {f"{trial}: unchanged": same, f"{trial}: goes on": refused[0] == norms[1]}


def refuse_all(world: World, trials: list[Trial]) -> dict[str, bool]:
    return {key: value for trial in trials for key, value in refuse(world, trial).items()}


def test_a_bad_gradient_on_one_rank_stops_all_before_the_update() -> None:
    trials = [Trial(2, 0, 2, ROUTERS), Trial(2, 2, 2, ROUTERS, offload=True)]
    for checks in run_ranks(refuse_all, 2, trials, timeout_s=300):
        assert [key for key, holds in checks.items() if not holds] == []


@pytest.mark.slow
def test_a_bad_gradient_stops_all_at_every_stage() -> None:
    trials = [Trial(2, stage, m, ROUTERS) for stage in (1, 2) for m in (1, 2)]
    for checks in run_ranks(refuse_all, 2, [*trials, Trial(2, 1, 1, BF16)], timeout_s=500):
        assert [key for key, holds in checks.items() if not holds] == []
