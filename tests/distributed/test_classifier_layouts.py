"""Classifiers on layouts: the oracle's numbers, sharded weights, recomputation, checkpoints."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import remat_runs
import torch
import torch.distributed as dist
from layout_cases import TEXTS
from layouts import RATES, VOCAB, differences, run_layout
from spawn import run_ranks

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.exchange import model_exchange
from moe_train.models.transformer import build_model
from moe_train.parallel.state import model_parts

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
LAYOUTS = {1: [(1, 1, 1), (1, 1, 4)], 2: [(1, 1, 1), (2, 1, 4), (2, 2, 1)],
           4: [(2, 1, 1), (4, 1, 4), (2, 4, 4), (1, 2, 1)]}  # fmt: skip
"""(ep, dp_shard, accumulation) by world size."""
ENCODER, SMALL, BOTH = TEXTS


def model_on(mesh, case, seeded: bool):
    config = case.config().model
    model = build_model(config, VOCAB, model_exchange(mesh, config), "fp64", torch.device("cpu"))
    return case.prepare(model) if seeded else model


def written_here(world, folder: Path) -> None:
    """A checkpoint of the model with values, on EP groups of all ranks."""
    mesh = build_mesh(world, world.size)
    state = CheckpointState(model_parts(model_on(mesh, BOTH, True)), {}, None)
    CheckpointManager(folder, world, mesh.layout, keep=1).save(3, state)


def read_here(world, folder: Path, ep: int) -> list[str]:
    """Names of what a model without values, on such groups, does not get from a checkpoint exactly."""
    mesh = build_mesh(world, ep)
    found, expected = model_on(mesh, BOTH, False), model_on(mesh, BOTH, True)
    open_at(folder, world).fill(model_parts(found))
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    return [name for (name, p), q in pairs if not torch.equal(p, q)]


def recomputed(world) -> dict:
    """What recomputation changes, to the last bit."""
    mesh, wrong = build_mesh(world, world.size), {}
    for case in (ENCODER, BOTH):
        plain = remat_runs.run(case, mesh, lambda model: None, 2)
        for mode in remat_runs.MODES:
            wrong[case.name, mode] = remat_runs.differences(
                remat_runs.run(case, mesh, remat_runs.remat(mode), 2), plain
            )
    return wrong


def on_layouts(world, truths, folder):
    """What differs from the truth by case and layout; what recomputation changes; what checkpoints lose."""
    torch.set_num_threads(1)
    wrong = {}
    for ep, dp_shard, accumulation in LAYOUTS[world.size]:
        mesh = build_mesh(world, ep, dp_shard)
        for case in TEXTS:
            found = run_layout(mesh, case, accumulation)
            wrong[case.name, ep, dp_shard, accumulation] = differences(found, truths[case.name], 1e-10)
    again = recomputed(world) if world.size == 2 else {}
    if world.size == 2:
        written_here(world, folder)
    lost = {ep: read_here(world, folder, ep) for ep in (1, 2, 4) if ep <= world.size}
    return wrong, again, lost


@pytest.fixture(scope="module")
def truths():
    return {case.name: oracle.train(case.config(), case.whole_model(), case.batches(), RATES) for case in TEXTS}


@pytest.fixture(scope="module")
def results(truths, tmp_path_factory):
    """By world size, in the order in which the checkpoint is written and read."""
    folder = tmp_path_factory.mktemp("checkpoint")
    found = {size: run_ranks(on_layouts, size, truths, folder, timeout_s=400) for size in (2, 4)}
    with joined(dist.HashStore(), alone := World(0, 1, torch.device("cpu"), 30.0)):
        found[1] = [on_layouts(alone, truths, folder)]
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_equals_the_truth_text_by_text(results, size):
    expected = {(case.name, *layout): [] for case in TEXTS for layout in LAYOUTS[size]}
    assert [wrong for wrong, _, _ in results[size]] == [expected] * size


def test_recomputation_changes_no_bit(results):
    for _, again, _ in results[2]:
        assert len(again) == 4
        assert {key: lines for key, lines in again.items() if lines} == {}


def test_a_checkpoint_of_two_ranks_with_half_the_experts_loads_on_every_layout(results):
    assert {size: [lost for _, _, lost in found] for size, found in results.items()} == {
        size: [{ep: [] for ep in (1, 2, 4) if ep <= size}] * size for size in LAYOUTS
    }


def test_every_parameter_learns(truths):
    for case in TEXTS:
        assert [name for name, g in truths[case.name].gradients.items() if not g.abs().max() > 1e-9] == []


def test_words_are_left_out_and_some_rows_have_no_text():
    """Else the cases would show less than they say."""
    for case in (ENCODER, SMALL):
        assert case.config().model.classifier.token_dropout > 0.0
        assert not case.batches()[0][2].any(dim=1).all()
    assert not BOTH.batches()[0][2][:8].any()
