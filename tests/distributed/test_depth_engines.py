"""Mixture-of-Depths with experts inside under DeepSpeed, and a checkpoint of it in another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed_samples import Trial, distances, engine_on, outcomes, train
from layouts import VOCAB, Case, torch_engine
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer
from moe_train.moe.foresight import looking_ahead

pytestmark = pytest.mark.timeout(300)
CASE = Case(
    "depth around experts",
    ("model.depth.kind=mixture_of_depths", "model.depth.capacity=0.5", "model.depth.causal_coef=0.3",
     "model.depth.predictor_dim=5", "model.ffn.num_shared_experts=1"),
    padding="uneven",
)  # fmt: skip


def looked_at(model: Transformer) -> list[Tensor]:
    """Logits of some texts by both choices."""
    tokens_BS = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), looking_ahead(model.eval()):
        ahead = model(tokens_BS).logits_BSV.clone()
    with torch.no_grad():
        return [ahead, model(tokens_BS).logits_BSV.clone()]


def saved(world: World, folder: Path) -> list[Tensor]:
    """Train with sharded experts and save."""
    mesh = build_mesh(world, 2)
    engine = engine_on(world, mesh, Trial(2, None, 1, (), CASE))
    train(engine, mesh, Trial(2, None, 1, (), CASE), range(2))
    manager = CheckpointManager(folder, world, mesh.layout, keep=1)
    manager.save(
        2,
        CheckpointState(
            engine.parts(),
            {},
            b"",
        ),
    )
    return looked_at(engine.model)


def loaded(world: World, mesh: Mesh, folder: Path) -> list[Tensor]:
    """A model with other weights, filled."""
    engine = torch_engine(mesh, CASE, "fp32")
    for parameter in engine.model.parameters():
        parameter.data.normal_()
    parts = engine.parts()
    open_at(folder, world).fill(parts)
    engine.adopt(parts)
    return looked_at(engine.model)


def trials_and_checkpoints(world: World, trials: list[Trial], folder: Path):
    torch.set_num_threads(1)
    expected = saved(world, folder)
    found = {ep: loaded(world, build_mesh(world, ep), folder) for ep in (1, 2)}
    return outcomes(world, trials), expected, found


def alone(world: World, folder: Path) -> list[Tensor]:
    return loaded(world, build_mesh(world, 1), folder)


@pytest.mark.slow
def test_deepspeed_equals_torch_and_a_checkpoint_loads_with_fewer_ranks(tmp_path: Path) -> None:
    trials = [Trial(1, None, 1, (), CASE), Trial(2, 0, 1, (), CASE), Trial(2, 1, 2, (), CASE), Trial(1, 2, 1, (), CASE)]
    results = run_ranks(trials_and_checkpoints, 2, trials, tmp_path, timeout_s=250)
    (on_one,) = run_ranks(alone, 1, tmp_path)
    for (truth, *others), expected, found in results:
        for trial, other in zip(trials[1:], others, strict=True):
            assert {key: error for key, error in distances(other, truth).items() if not error <= 1e-5} == {}, trial
        assert any("router.hidden" in key for key in truth.state)
        assert not torch.equal(*expected)
        for logits in (*found.values(), on_one):
            for a, b in zip(logits, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
