"""Recomputation changes nothing: every gradient, weight, loss and count is the same, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from layout_cases import ARCHITECTURES, GRAPH, HEADS, MIXED, NO_LOSS, PLAIN
from layouts import Case
from remat_runs import MODES, differences, model_of, remat, run

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.parallel.remat import Remat, apply_remat

EACH_MODE = pytest.mark.parametrize("mode", MODES)
CASES = [PLAIN[0], PLAIN[5], *NO_LOSS, *MIXED, *ARCHITECTURES, *GRAPH, *HEADS]
"""Every router, capacity rule, balance loss, kind of attention and of network; modules of prediction ahead; graphs."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_of_two_micro_batches_is_the_same(case: Case, mesh: Mesh) -> None:
    expected = run(case, mesh, lambda model: None, accumulation=2)
    for mode in MODES:
        assert differences(run(case, mesh, remat(mode), accumulation=2), expected) == [], mode


@EACH_MODE
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [PLAIN[0], MIXED[0], ARCHITECTURES[0], GRAPH[1]], ids=str)
def test_three_steps_in_other_precisions_are_the_same(case: Case, precision: str, mode: Remat, mesh: Mesh) -> None:
    expected = run(case, mesh, lambda model: None, steps=3, precision=precision)
    assert differences(run(case, mesh, remat(mode), steps=3, precision=precision), expected) == []


@EACH_MODE
@pytest.mark.parametrize("case", [PLAIN[0], ARCHITECTURES[0], *GRAPH[:4]], ids=str)
def test_what_a_model_is_called_and_does_stays(case: Case, mode: Remat, mesh: Mesh) -> None:
    """Names of parameters, evaluation without gradients, and copies, which have weights of their own."""
    plain, model = (model_of(case, mesh, "fp64") for _ in range(2))
    apply_remat(model, mode)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.moe_layers.keys() == plain.moe_layers.keys()
    tokens_BS, _ = case.batches()[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens_BS).logits_BSV, plain.eval()(tokens_BS).logits_BSV)
        other = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(tokens_BS).logits_BSV, plain(tokens_BS).logits_BSV)


def test_none_leaves_the_model_alone(mesh: Mesh) -> None:
    model = model_of(PLAIN[0], mesh, "fp64")
    before = [dict(vars(module)) for module in model.modules()]
    apply_remat(model, "none")
    assert [vars(module) for module in model.modules()] == before
