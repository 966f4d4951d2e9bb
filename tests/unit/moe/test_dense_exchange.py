"""The exchange of dense layers: each rank gets what all experts, in order, made of its own tokens; at what cost."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from mesh_checks import Check, failures, said_of
from moe_samples import make_layer
from spawn import run_ranks
from torch import Tensor
from waiting import NoWaiting

from moe_train.config.model import ModelConfig
from moe_train.dist.comm import METER
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.build import build_block
from moe_train.models.initialise import initialise
from moe_train.moe.dense_exchange import AllGatherExchange, DenseExchange, LocalDenseExchange
from moe_train.moe.exchange import AllToAllExchange, LocalExchange, PaddedExchange
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.roles import Kind, roles_of

EXPERTS, DIM, BATCH, LENGTH, TOP_K = 8, 6, 4, 3, 2
TOKENS = BATCH * LENGTH
KINDS = ("ffn", "block")
FP64, INT32, BF16 = 8, 4, 2
"""Bytes."""
EXCHANGES = 2
"""Tokens go out, results come home; and the same way back."""


def layer_of(mesh: Mesh, expert: str, sharded: bool = True, **graph: object) -> GraphLayer:
    """The same values on every layout."""
    ffn = {"num_experts": EXPERTS, "expert_dim": 5, "expert_bias": True, "graph": {"expert": expert, **graph}}
    model = {"dim": DIM, "layers": 1, "heads": 1, "init_std": 0.5, "positions": "learned", "max_positions": LENGTH}
    exchange = AllToAllExchange(mesh.ep, EXPERTS) if sharded else LocalExchange(EXPERTS)
    block = build_block(ModelConfig.model_validate({**model, "ffn": ffn}), 0, exchange).double()
    initialise(block, seed=1)
    layer = block.ffn if expert == "ffn" else block.layer
    assert isinstance(layer, GraphLayer)
    return layer


def tokens_of(rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, S, D] of one rank, asking for its gradient."""
    generator = torch.Generator().manual_seed(rank)
    x_BSD = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64, generator=generator)
    return x_BSD.to(dtype).requires_grad_()


def members(mesh: Mesh) -> list[int]:
    return dist.get_process_group_ranks(mesh.ep)


def plain_experts(exchange: DenseExchange, weights_ED: Tensor, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """What comes home [B, S, E, D] from experts that multiply tokens by their weights, and those weights held here."""
    held_LD = weights_ED[exchange.experts.start : exchange.experts.stop].clone().requires_grad_()
    return exchange.combine(exchange.dispatch(x_BSD).unsqueeze(2) * held_LD), held_LD


def check_against_local(mesh: Mesh) -> None:
    """All ranks' tokens at once, with all experts in one place, are the truth; values are only copied: bit for bit."""
    exchange, local = AllGatherExchange(mesh.ep, EXPERTS), LocalDenseExchange(EXPERTS)
    weights_ED = torch.randn(EXPERTS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    whole_BSD = torch.cat([tokens_of(rank) for rank in members(mesh)]).detach().requires_grad_()
    truth_BSED, truth_ED = plain_experts(local, weights_ED, whole_BSD)
    upstream_BSED = torch.randn(truth_BSED.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(98))
    truth_BSED.backward(upstream_BSED)
    own = slice(mesh.ep_rank * BATCH, (mesh.ep_rank + 1) * BATCH)
    x_BSD = tokens_of(mesh.rank)
    assert torch.equal(exchange.dispatch(x_BSD), whole_BSD), "all tokens, in order of ranks"
    home_BSED, held_LD = plain_experts(exchange, weights_ED, x_BSD)
    assert torch.equal(home_BSED, truth_BSED[own]), "of its own tokens, in order of experts"
    for _ in range(2):
        x_BSD.grad = held_LD.grad = None
        home_BSED.backward(upstream_BSED[own], retain_graph=True)
        assert torch.allclose(x_BSD.grad, whole_BSD.grad[own], rtol=0, atol=1e-13)
        held = truth_ED.grad[exchange.experts.start : exchange.experts.stop]
        assert torch.allclose(held_LD.grad, held, rtol=0, atol=1e-13)


def check_who_holds_what(mesh: Mesh) -> None:
    sparse = AllToAllExchange(mesh.ep, EXPERTS)
    assert sparse.dense == PaddedExchange(mesh.ep, EXPERTS, sparse).dense == AllGatherExchange(mesh.ep, EXPERTS)
    assert sparse.dense.experts == sparse.experts == mesh.layout.experts(mesh.rank, EXPERTS)
    assert LocalExchange(EXPERTS).dense == LocalDenseExchange(EXPERTS)
    assert LocalDenseExchange(EXPERTS).experts == range(EXPERTS)


def results_of(layer: GraphLayer, rank: int) -> dict[str, Tensor]:
    x_BSD = tokens_of(rank)
    y_BSD = layer(x_BSD).y_BSD
    (y_BSD * tokens_of(100 + rank).detach()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y_BSD.detach(), "input gradient": x_BSD.grad, **gradients}


def check_layers(mesh: Mesh) -> None:
    """Outputs and gradients are those of a layer with all experts here; experts see what came from the whole group."""
    for expert in KINDS:
        for graph in ({}, {"chunk_tokens": 2 * LENGTH, "recompute": True}):
            layer = layer_of(mesh, expert, **graph)
            roles, found = roles_of(layer), results_of(layer, mesh.rank)
            for name, truth in results_of(layer_of(mesh, expert, sharded=False), mesh.rank).items():
                if name in roles and roles[name].kind is Kind.EXPERT:
                    dist.all_reduce(truth, group=mesh.ep)
                    truth = truth[layer.exchange.experts.start : layer.exchange.experts.stop]
                error = (found[name] - truth).abs().max().item()
                assert error < 1e-11, f"{expert} {graph}: {name} differs by {error:.1e}"


def cost_of(layer: GraphLayer, x_BSD: Tensor) -> dict[str, tuple[int, int]]:
    """Bytes and exchanges of the forward and of the backward pass, what stays on the rank included."""
    METER.take_ms()
    y_BSD = layer(x_BSD).y_BSD
    there = (METER.sent_bytes, METER.calls)
    METER.take_ms()
    y_BSD.sum().backward()
    back = (METER.sent_bytes, METER.calls)
    METER.take_ms()
    return {"forward": there, "backward": back}


def check_bytes(mesh: Mesh) -> None:
    """(P + E) · D · b per token, forward and backward alike; chunks cost nothing, recomputing a forward pass."""
    size = mesh.ep.size()
    for expert in KINDS:
        for dtype, width in ((torch.float64, FP64), (torch.bfloat16, BF16)):
            once = TOKENS * (size + EXPERTS) * DIM * width
            x_BSD = tokens_of(mesh.rank, dtype)
            cost = {"forward": (once, EXCHANGES), "backward": (once, EXCHANGES)}
            assert cost_of(layer_of(mesh, expert), x_BSD) == cost, expert
            chunks = 2
            cost = {"forward": (once, chunks * EXCHANGES), "backward": (once, chunks * EXCHANGES)}
            assert cost_of(layer_of(mesh, expert, chunk_tokens=TOKENS // chunks), x_BSD) == cost, expert
            cost = {"forward": (once, chunks * EXCHANGES), "backward": (2 * once, 2 * chunks * EXCHANGES)}
            recomputed = layer_of(mesh, expert, chunk_tokens=TOKENS // chunks, recompute=True)
            assert cost_of(recomputed, x_BSD) == cost, expert
            with torch.no_grad():
                assert cost_of_evaluation(recomputed, x_BSD) == (once, chunks * EXCHANGES)


def cost_of_evaluation(layer: GraphLayer, x_BSD: Tensor) -> tuple[int, int]:
    METER.take_ms()
    layer.eval()(x_BSD)
    found = (METER.sent_bytes, METER.calls)
    METER.take_ms()
    return found


def sparse_rows(mesh: Mesh, top_k: int) -> float:
    """Rows per token that a sparse layer sends to experts, each with K ids and weights; as many sums come home."""
    METER.take_ms()
    make_layer(EXPERTS, top_k, exchange=AllToAllExchange(mesh.ep, EXPERTS))(tokens_of(mesh.rank))
    sent_bytes = torch.tensor(METER.sent_bytes)
    METER.take_ms()
    dist.all_reduce(sent_bytes, group=mesh.ep)  # who sends home depends on the routing
    return sent_bytes.item() / (TOKENS * mesh.ep.size()) / (2 * DIM * FP64 + top_k * (INT32 + FP64))


def check_against_a_sparse_layer(mesh: Mesh) -> None:
    """A sparse layer sends at most min(K, P) rows each way per token, a dense one P there and E back."""
    size = mesh.ep.size()
    found, most = sparse_rows(mesh, TOP_K), min(TOP_K, size)
    assert 1 <= found <= most
    assert found > 1 or size == 1, "some token has its experts on two ranks"
    assert sparse_rows(mesh, EXPERTS) == size
    dense_bytes, _ = cost_of(layer_of(mesh, "ffn"), tokens_of(mesh.rank))["forward"]
    assert dense_bytes / (TOKENS * DIM * FP64) == size + EXPERTS > 2 * most


def check_nothing_waits(mesh: Mesh) -> None:
    """Neither forward nor backward does the host need a number of the device."""
    for expert in KINDS:
        layer = layer_of(mesh, expert, max_neighbors=2)
        with NoWaiting():
            layer(tokens_of(mesh.rank)).y_BSD.backward(torch.ones(BATCH, LENGTH, DIM, dtype=torch.float64))


CHECKS = (
    check_against_local,
    check_who_holds_what,
    check_layers,
    check_bytes,
    check_against_a_sparse_layer,
    check_nothing_waits,
)


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    """By rank."""
    return run_ranks(failures, 4, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_dense_exchange(wrong: list[dict[str, str]], check: Check) -> None:
    assert said_of(check, wrong) == []


def test_a_rank_alone_exchanges_nothing() -> None:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        layer = layer_of(build_mesh(world, 1), "ffn", sharded=False)
        assert cost_of(layer, tokens_of(0)) == {"forward": (0, 0), "backward": (0, 0)}
        assert failures(world, CHECKS) == {}
