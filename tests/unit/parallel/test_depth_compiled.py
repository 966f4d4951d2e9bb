"""Blocks that only some tokens pass, with compiled parts and recomputation: the same values, few graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from layouts import VOCAB, Case
from remat_runs import model_of
from torch import Tensor
from torch._dynamo.utils import counters

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.transformer import Transformer
from moe_train.parallel.compile import apply_compile, static_parts
from moe_train.parallel.remat import Remat, apply_remat

DEEP = ("model.depth.kind=mixture_of_depths", "model.depth.capacity=0.4", "model.depth.causal=classifier")
CASES = [Case("dense", (*DEEP, "model.ffn.num_experts=0")), Case("experts", (*DEEP, "model.ffn.num_shared_experts=1"))]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test compiles for itself."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(seed))


def learned(model: Transformer, seed: int) -> list[Tensor]:
    output = model.train()(tokens(seed))
    model.zero_grad()
    own = sum(
        layer.balance.share(record, record.statistics)
        for layer, record in zip(model.expert_layers.values(), output.records, strict=True)
    )
    torch.autograd.backward(output.logits_BSV.square().mean() + own)
    return [output.logits_BSV.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def seen(model: Transformer, seed: int) -> Tensor:
    with torch.no_grad():
        logits_BSV: Tensor = model.eval()(tokens(seed)).logits_BSV
    return logits_BSV


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "selective")), "full"]
)
def test_the_same_values(case: Case, mode: Remat, mesh: Mesh) -> None:
    """Also where a block takes another number of tokens at each step: after some sizes torch compiles for any."""
    plain, model = (model_of(case, mesh, "fp64") for _ in range(2))
    apply_compile(model, "aot_eager")
    apply_remat(model, mode)
    for seed in range(6):
        for a, b in zip(learned(model, seed), learned(plain, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen(model, seed), seen(plain, seed), rtol=1e-9, atol=1e-9)
    assert int(counters["stats"]["unique_graphs"]) <= 5 * len(list(static_parts(model)))
    assert not counters["graph_break"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_inner_block_is_what_is_compiled_and_computed_again(case: Case, mesh: Mesh) -> None:
    model = model_of(case, mesh, "fp32")
    owners = [owner for owner, _ in static_parts(model)]
    assert all(any(part is owner for part in model.modules()) for owner in owners)
    assert model.all_blocks[1].inner in owners and model.all_blocks[1] not in owners
