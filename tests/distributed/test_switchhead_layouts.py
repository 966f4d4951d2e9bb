"""Attention with experts on layouts: the oracle's numbers, sharded weights, recomputation, checkpoints, folders."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import remat_runs
import torch
import torch.distributed as dist
from layout_cases import HEADS
from layouts import RATES, VOCAB, differences, run_layout
from spawn import run_ranks

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.interop.native import NATIVE
from moe_train.interop.pieces import held_of
from moe_train.models.exchange import model_exchange
from moe_train.models.transformer import build_model
from moe_train.moe.roles import Kind, roles_of
from moe_train.parallel.state import model_parts

pytestmark = pytest.mark.timeout(300)
LAYOUTS = {1: [(1, 1, 1), (1, 1, 4)], 2: [(1, 1, 1), (2, 1, 4), (2, 2, 1)],
           4: [(1, 1, 4), (2, 1, 1), (4, 1, 4), (4, 1, 1), (2, 4, 4), (1, 2, 1)]}  # fmt: skip
"""(ep, dp_shard, accumulation) by world size."""
ALL, ALONE, FEWER = HEADS


def model_on(mesh, case, seeded: bool):
    config = case.config().model
    model = build_model(config, VOCAB, model_exchange(mesh, config), "fp64", torch.device("cpu"))
    return case.prepare(model) if seeded else model


def written_here(world, folder: Path) -> None:
    """A checkpoint of the model with values, on EP groups of all ranks."""
    mesh = build_mesh(world, world.size)
    state = CheckpointState(model_parts(model_on(mesh, ALL, True)), {}, None)
    CheckpointManager(folder, world, mesh.layout, keep=1).save(3, state)


def read_here(world, folder: Path, ep: int) -> list[str]:
    """Names of what a model without values, on such groups, does not get from a checkpoint exactly."""
    mesh = build_mesh(world, ep)
    found, expected = model_on(mesh, ALL, False), model_on(mesh, ALL, True)
    open_at(folder, world).fill(model_parts(found))
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    return [name for (name, p), q in pairs if not torch.equal(p, q)]


def recomputed(world) -> dict:
    """What recomputation changes, to the last bit, and whether selective sends more."""
    wrong = {}
    for ep, dp_shard in {(1, 1), (world.size, 1), (1, world.size)}:
        mesh = build_mesh(world, ep, dp_shard)
        for case in (ALL, ALONE):
            plain = remat_runs.run(case, mesh, lambda model: None, 2)
            for mode in remat_runs.MODES:
                ran = remat_runs.run(case, mesh, remat_runs.remat(mode), 2)
                lines = remat_runs.differences(ran, plain)
                if mode == "selective" and ran.rows_sent != plain.rows_sent:
                    lines.append(f"{ran.rows_sent} journeys, not {plain.rows_sent}")
                if mode == "full" and ep > 1 and not ran.rows_sent > plain.rows_sent:
                    lines.append("nothing travelled again: nothing was computed again")
                wrong[case.name, ep, dp_shard, mode] = lines
    return wrong


def on_layouts(world, truths, folder):
    """What differs from the truth by case and layout; what recomputation changes; what checkpoints lose."""
    torch.set_num_threads(1)
    wrong = {}
    for ep, dp_shard, accumulation in LAYOUTS[world.size]:
        mesh = build_mesh(world, ep, dp_shard)
        for case in HEADS:
            found = run_layout(mesh, case, accumulation)
            wrong[case.name, ep, dp_shard, accumulation] = differences(found, truths[case.name], 1e-10)
    again = recomputed(world) if world.size == 2 else {}
    if world.size == 2:
        written_here(world, folder)
    lost = {ep: read_here(world, folder, ep) for ep in (1, 2, 4) if ep <= world.size}
    return wrong, again, lost


@pytest.fixture(scope="module")
def truths():
    return {case.name: oracle.train(case.config(), case.whole_model(), case.batches(), RATES) for case in HEADS}


@pytest.fixture(scope="module")
def results(truths, tmp_path_factory):
    """By world size, in the order in which the checkpoint is written and read."""
    folder = tmp_path_factory.mktemp("checkpoint")
    found = {size: run_ranks(on_layouts, size, truths, folder, timeout_s=240) for size in (2, 4)}
    with joined(dist.HashStore(), alone := World(0, 1, torch.device("cpu"), 30.0)):
        found[1] = [on_layouts(alone, truths, folder)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_equals_the_truth_token_by_token(results, size):
    expected = {(case.name, *layout): [] for case in HEADS for layout in LAYOUTS[size]}
    assert [wrong for wrong, _, _ in results[size]] == [expected] * size


@pytest.mark.slow
def test_recomputation_changes_no_bit_and_sends_nothing_twice(results):
    for _, again, _ in results[2]:
        assert len(again) == 12
        assert {key: lines for key, lines in again.items() if lines} == {}


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_with_half_the_experts_loads_on_every_layout(results):
    assert {size: [lost for _, _, lost in found] for size, found in results.items()} == {
        size: [{ep: [] for ep in (1, 2, 4) if ep <= size}] * size for size in LAYOUTS
    }


def test_every_parameter_learns(truths):
    for case in HEADS:
        assert [name for name, g in truths[case.name].gradients.items() if not g.abs().max() > 1e-9] == []


def test_the_two_kinds_of_experts_have_different_numbers_and_dropout_decides():
    """Else the tests above would miss that one number is taken for the other, or that nothing is drawn."""
    roles = roles_of(ALL.whole_model())
    numbers = {len(role.experts) for role in roles.values() if role.kind is Kind.EXPERT}
    assert numbers == {4, 8}
    assert ALL.config().model.attention.expert_dropout > 0.0


def held_on(world) -> dict[str, bool]:
    """Whether each rank finds its own experts of either kind among the parts of a folder of our own."""
    mesh = build_mesh(world, world.size)
    model, table = model_on(mesh, ALL, True), NATIVE.parts(ALL.config().model, VOCAB)
    held, roles = held_of(model), roles_of(model)
    found = {}
    for name in held.sharded:
        here = [part.expert for part in table[name] if held.view(name, part) is not None]
        found[name] = here == list(roles[name].experts)
    return found


def test_ranks_know_which_experts_of_either_kind_they_have_of_an_exported_model():
    for found in run_ranks(held_on, 2):
        assert len(found) == 8
        assert all(found.values())
