"""Compiled parts of blocks: the same values by rounding, and no graph more when tokens choose other experts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from layout_cases import ARCHITECTURES, GRAPH, HEADS, PLAIN
from layouts import VOCAB, Case
from remat_runs import model_of
from torch import Tensor
from torch._dynamo.utils import counters

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.transformer import Transformer
from moe_train.moe.balance import RoutingRecord
from moe_train.ops.pointwise import fused
from moe_train.parallel.compile import apply_compile, static_parts
from moe_train.parallel.remat import Remat, apply_remat

CASE = Case("all parts", ("model.ffn.num_shared_experts=1", "model.ffn.first_dense=1"))
PARTS = 3
"""Attention, dense network, shared experts."""
QUICK, REAL = "aot_eager", "inductor"
"""A backend that traces and takes gradients like the real one, and the one that generates code, in minutes."""


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


def tokens(batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def learn(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """One pass, modules that look ahead included; the gradients add up. What went to each expert, where one chooses."""
    output = model.train()(tokens_BS)
    scores = [output.logits_BSV, *output.mtp_logits]
    torch.autograd.backward(sum(logits_BSV.square().mean() for logits_BSV in scores))
    record = output.records[0]
    return record.counts_E if isinstance(record, RoutingRecord) else torch.zeros(0)


def look(model: Transformer, tokens_BS: Tensor) -> Tensor:
    with torch.no_grad():
        logits_BSV: Tensor = model.eval()(tokens_BS).logits_BSV
    return logits_BSV


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def check_growth(model: Transformer) -> None:
    """One graph per part for training and one for evaluation, whatever the routers do and however often they change."""
    loads = [learn(model, tokens(3, 8, seed=0))]
    assert graphs() == PARTS
    look(model, tokens(3, 8, seed=0))
    assert graphs() == 2 * PARTS
    for seed in range(1, 5):
        loads.append(learn(model, tokens(3, 8, seed)))
        look(model, tokens(3, 8, seed))
    assert len({tuple(load.tolist()) for load in loads}) > 1, "the loads of the experts did not change"
    assert graphs() == 2 * PARTS
    for batch in (5, 7, 9):  # another size: once more, for any
        learn(model, tokens(batch, 8, seed=batch))
    assert graphs() <= 3 * PARTS
    assert not counters["graph_break"]


def check_values(case: Case, mesh: Mesh, mode: Remat, backend: str) -> None:
    plain, model = (model_of(case, mesh, "fp32") for _ in range(2))
    apply_compile(model, backend)
    apply_remat(model, mode)
    for seed in range(2):
        tokens_BS = tokens(3, 6, seed)
        assert torch.equal(learn(plain, tokens_BS), learn(model, tokens_BS))
        torch.testing.assert_close(look(model, tokens_BS), look(plain, tokens_BS), rtol=1e-5, atol=1e-5)
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert found.grad is not None, name
        assert expected.grad is not None, name
        scale = expected.grad.abs().max().clamp(min=1e-3)
        assert ((found.grad - expected.grad).abs().max() / scale) < 1e-5, name


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_no_graph_more_when_loads_change(mode: Remat, mesh: Mesh) -> None:
    model = model_of(CASE, mesh, "fp32")
    apply_compile(model, QUICK)
    apply_remat(model, mode)
    check_growth(model)


def test_no_kernel_more_in_twenty_steps_of_changing_loads(mesh: Mesh) -> None:
    """Each marked function settles after a few sizes: how many rows an expert gets is another number in each step."""
    model = model_of(CASE, mesh, "fp32")
    loads, grown = [], []
    with fused(QUICK):
        for step in range(20):
            loads.append(learn(model, tokens(3 + step % 3, 8, seed=step)))
            grown.append(graphs())
    assert len({tuple(load.tolist()) for load in loads}) > 10, "the loads of the experts did not change"
    assert grown[0] > 0, "nothing was fused"
    assert grown[-1] == grown[4], grown
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_same_values_computed_again(mode: Remat, mesh: Mesh) -> None:
    check_values(CASE, mesh, mode, QUICK)


def test_attention_with_experts_has_the_same_values_computed_again(mesh: Mesh) -> None:
    check_values(HEADS[2], mesh, "selective", QUICK)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_code_gives_the_same_values_and_grows_no_graph(mesh: Mesh) -> None:
    for mode in ("none", "selective", "full"):
        check_values(CASE, mesh, mode, REAL)
    torch._dynamo.reset()
    counters.clear()
    model = model_of(CASE, mesh, "fp32")
    apply_compile(model, REAL)
    check_growth(model)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [ARCHITECTURES[0], ARCHITECTURES[2], GRAPH[0]], ids=str)
def test_other_architectures_computed_again(case: Case, mesh: Mesh) -> None:
    """Latent attention and modules ahead; sinks and windows that differ from layer to layer; a graph of networks."""
    check_values(case, mesh, "selective", QUICK)


def test_only_what_no_routing_shapes_is_compiled(mesh: Mesh) -> None:
    def found(case: Case) -> list[str]:
        model = model_of(case, mesh, "fp32")
        names = {id(module): name for name, module in model.named_modules()}
        return [f"{names[id(owner)]}.{method}" for owner, method in static_parts(model)]

    assert found(CASE) == ["blocks.0.attend", "blocks.0.feed", "blocks.1.attend", "blocks.1.ffn.shared.forward"]
    assert found(PLAIN[0]) == ["blocks.0.attend", "blocks.1.attend"]
    assert found(GRAPH[0]) == ["blocks.0.attend"]
    assert found(HEADS[0]) == ["blocks.0.attention.look", "blocks.1.attention.look"]
    assert found(GRAPH[1]) == []
