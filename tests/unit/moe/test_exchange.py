"""The exchange between ranks: equal to having all experts here, in values, gradients and cost."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from moe_samples import DIM, IdentityExperts, context_of, make_layer, tokens
from spawn import run_ranks
from torch import Tensor, nn
from waiting import NoWaiting

from moe_train.config.routing import DroplessConfig, FactorCapacityConfig
from moe_train.dist.comm import METER, all_to_all_rows
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.moe.exchange import AllToAllExchange, LocalExchange, PaddedExchange, exchange_for, route
from moe_train.moe.layer import MoELayer

BATCH, LENGTH, EXPERTS, TOP_K = 2, 5, 8, 2
NUM_TOKENS = BATCH * LENGTH
EXCHANGES_PER_FORWARD = 3
"""Ids with weights and rows go out, sums come home. (The table of counts goes ahead of them, unmetered.)"""
EXCHANGES_PER_BACKWARD = 3
"""The same way back, without the ids, which are integers."""
PADDED_EXCHANGES = 3
"""Rows and weights go out, sums come home; and the same way back. No table of counts goes ahead."""
FP64, INT32 = 8, 4
"""Bytes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its tokens."""

    name: str
    top_k: int = TOP_K
    factor: float | None = None
    zero_router: bool = False
    silent_ranks: tuple[int, ...] = ()
    reroute: bool = False
    scope: str = "sequence"


CASES = [
    Case("top-2"),
    Case("top-1", top_k=1),
    Case("trap 22: every expert", top_k=EXPERTS),
    Case("trap 22: all tokens to the first rank", zero_router=True),
    Case("trap 21: a rank with nothing to send", silent_ranks=(1,)),
    Case("trap 21: a rank with nothing to send or receive", zero_router=True, silent_ranks=(1,)),
    Case("trap 21: nothing at all", silent_ranks=(0, 1, 2, 3)),
    Case("with drops", factor=0.6),
]
PADDED_CASES = [
    *(dataclasses.replace(case, factor=case.factor or EXPERTS) for case in CASES),
    Case("with drops, by rank", factor=0.6, scope="rank"),
    Case("rerouted", factor=0.6, reroute=True),
    Case("rerouted from the first rank, by rank", factor=1.0, reroute=True, scope="rank", zero_router=True),
]


def layer_of(case: Case, mesh: Mesh, sharded: bool, padded: bool = False) -> MoELayer:
    exchange = AllToAllExchange(mesh.ep, EXPERTS) if sharded else LocalExchange(EXPERTS)
    fields = {"factor": case.factor or 1.0, "reroute": case.reroute, "scope": case.scope, "pad": padded}
    capacity = DroplessConfig() if case.factor is None else FactorCapacityConfig.model_validate(fields)
    exchange = PaddedExchange(mesh.ep, EXPERTS, exchange) if padded else exchange
    layer = make_layer(EXPERTS, case.top_k, capacity, exchange=exchange)
    if case.zero_router:  # equal logits: everybody chooses the experts with the lowest indices
        nn.init.zeros_(layer.router.weight)
    return layer


def results_of(layer: MoELayer, case: Case, rank: int) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens; experts hold what came from the whole group."""
    x_BSD = tokens(BATCH, LENGTH, seed=rank)
    valid_BS = torch.full((BATCH, LENGTH), rank not in case.silent_ranks)
    y_BSD = layer(x_BSD, context_of(BATCH, LENGTH, valid_BS)).y_BSD
    (y_BSD * tokens(BATCH, LENGTH, seed=100 + rank).detach()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y_BSD.detach(), "input gradient": x_BSD.grad, **gradients}


def check_equal_to_local(mesh: Mesh, padded: bool) -> None:
    for case in PADDED_CASES if padded else CASES:
        sharded = results_of(layer_of(case, mesh, True, padded), case, mesh.rank)
        local = results_of(layer_of(case, mesh, sharded=False), case, mesh.rank)
        held = mesh.layout.experts(mesh.rank, EXPERTS)
        for name, expected in local.items():
            if name.startswith("experts."):
                dist.all_reduce(expected, group=mesh.ep)
                expected = expected[held.start : held.stop]
            error = (sharded[name] - expected).abs().max().item()
            assert error < 1e-12, f"{case.name}, padded {padded}, rank {mesh.rank}: {name} differs by {error:.1e}"
        if case.zero_router and mesh.ep_rank > 0 and not case.reroute:
            assert not sharded["experts.down_LFD"].any(), "zeros, not None, where no token came"


def check_identity(mesh: Mesh, padded: bool) -> None:
    for top_k in (1, 3, EXPERTS):
        layer = layer_of(Case("identity", top_k, factor=EXPERTS if padded else None), mesh, True, padded)
        layer.experts = IdentityExperts(EXPERTS // mesh.ep.size())
        x_BSD = tokens(BATCH, LENGTH, seed=mesh.rank)
        assert torch.allclose(layer(x_BSD).y_BSD, x_BSD, rtol=0, atol=1e-13), f"top-{top_k}, padded {padded}"


def check_cost(mesh: Mesh) -> None:
    """Experts 0 and 1 both live on rank 0: each token goes there once, not once per expert."""
    layer = layer_of(Case("all tokens to the first rank", zero_router=True), mesh, sharded=True)
    METER.take_ms()
    y_BSD = layer(tokens(BATCH, LENGTH)).y_BSD
    assert METER.calls == EXCHANGES_PER_FORWARD
    out_bytes = NUM_TOKENS * (DIM * FP64 + TOP_K * INT32 + TOP_K * FP64)
    arrived = NUM_TOKENS * mesh.ep.size() if mesh.ep_rank == 0 else 0
    assert METER.sent_bytes == out_bytes + arrived * DIM * FP64
    y_BSD.sum().backward()
    assert METER.calls == EXCHANGES_PER_FORWARD + EXCHANGES_PER_BACKWARD
    METER.take_ms()
    assert (METER.calls, METER.sent_bytes, METER.seconds) == (0, 0, 0.0)


@contextmanager
def network() -> Iterator[list[tuple[list[int], int]]]:
    """What passes through collectives of rows: for each, the rows by rank and the bytes of a row."""
    true, passed = dist.all_to_all_single, []

    def watched(out: Tensor, own: Tensor, received: list[int], sent: list[int], **kwargs: Any) -> Any:
        passed.append((list(sent), own[0].numel() * own.element_size() if len(own) else 0))
        return true(out, own, received, sent, **kwargs)

    with (
        mock.patch.object(dist, "all_to_all_single", watched),
        mock.patch.object(route, "exchange_counts", lambda table_PM, group: exchanged(true, table_PM, group)),
    ):
        yield passed


def exchanged(collective: Callable[..., Any], table_PM: Tensor, group: dist.ProcessGroup) -> Tensor:
    out_PM = torch.empty_like(table_PM)
    collective(out_PM, table_PM.contiguous(), group=group)
    return out_PM


def check_network(mesh: Mesh) -> None:
    """What a rank has for itself takes no collective, and the bytes of the others are those that the meter counts.

    Choices of one token that live together make one row: all tokens to rank 0, with two experts of it or with all.
    """
    size, own = mesh.ep.size(), mesh.ep_rank
    for top_k in {1, 2, EXPERTS // size}:
        layer = layer_of(Case("all tokens to the first rank", top_k, zero_router=True), mesh, sharded=True)
        METER.take_ms()
        with network() as passed:
            layer(tokens(BATCH, LENGTH)).y_BSD.sum().backward()
        out, back = [0] * size, [0] * size
        if own > 0:
            out[0] = NUM_TOKENS
        else:
            back = [0, *(NUM_TOKENS for _ in range(1, size))]
        assert [rows for rows, _ in passed] == [out, out, back, out, back, back], (top_k, own)
        total_bytes = sum(sum(rows) * row_bytes for rows, row_bytes in passed)
        assert total_bytes == METER.inside_bytes + METER.between_bytes
        METER.take_ms()


def check_padded_cost(mesh: Mesh) -> None:
    """The same bytes wherever tokens go: as many rows as the buffers have."""
    for zero_router in (False, True):
        layer = layer_of(Case("padded", factor=1.0, zero_router=zero_router), mesh, True, padded=True)
        rows = BATCH * layer.capacity.limit(training=True).of(LENGTH) * EXPERTS
        METER.take_ms()
        y_BSD = layer(tokens(BATCH, LENGTH)).y_BSD
        assert METER.calls == PADDED_EXCHANGES
        assert METER.sent_bytes == rows * (2 * DIM + 1) * FP64
        y_BSD.sum().backward()
        assert METER.calls == 2 * PADDED_EXCHANGES
        METER.take_ms()


def check_padded_does_not_wait(mesh: Mesh) -> None:
    """Neither from tokens to experts nor back, nor in the backward pass, does the host need a number of the device."""
    layer = layer_of(Case("padded", factor=0.6), mesh, True, padded=True)
    layer.experts = IdentityExperts(EXPERTS // mesh.ep.size())
    x_BSD, context = tokens(BATCH, LENGTH), context_of(BATCH, LENGTH)
    x_TD = x_BSD.flatten(0, 1)
    plan = layer.capacity.plan(layer.router(x_TD, context), context, training=True)
    with NoWaiting():
        transit = layer.exchange.dispatch(x_TD, plan)
        (arrived,) = transit
        transit.send_home(layer.experts(arrived), arrived)
        y_TD = transit.home()
        y_TD.backward(torch.ones_like(y_TD))
    empty_R = (arrived.rows_RD == 0).all(dim=1)
    assert empty_R.any()
    assert not arrived.weights_RK[empty_R].any(), "what fills a buffer up has no weight"
    assert arrived.num_assignments == len(arrived.rows_RD) == arrived.experts_RK.numel()


def check_padded_without_limit(mesh: Mesh) -> None:
    """Evaluation has no limit, so no buffers of fixed size either: whatever comes is computed."""
    case = Case("evaluation", factor=0.6)
    padded, plain = (layer_of(case, mesh, True, padded).eval() for padded in (True, False))
    assert padded.exchange.experts == plain.exchange.experts
    METER.take_ms()
    x_BSD = tokens(BATCH, LENGTH, seed=mesh.rank)
    assert torch.equal(padded(x_BSD).y_BSD, plain(x_BSD).y_BSD)
    assert METER.calls == 2 * EXCHANGES_PER_FORWARD
    METER.take_ms()


def check_adjoint(mesh: Mesh) -> None:
    """<A x, y> = <x, Aᵀ y>, summed over the ranks, for uneven exchanges with zeros among them."""
    size, rank = mesh.ep.size(), mesh.ep_rank
    generator = torch.Generator().manual_seed(5)
    table_PP = torch.randint(-2, 4, (size, size), generator=generator).clamp(min=0)
    sent, received = table_PP[rank].tolist(), table_PP[:, rank].tolist()
    torch.manual_seed(rank)
    x_ND = torch.randn(sum(sent), 3, dtype=torch.float64, requires_grad=True)
    there_RD = all_to_all_rows(x_ND, received, sent, mesh.ep.group_name)
    y_RD = torch.randn_like(there_RD)
    (back_ND,) = torch.autograd.grad(there_RD, x_ND, y_RD)
    products = torch.stack([(there_RD * y_RD).sum(), (x_ND * back_ND).sum()]).detach()
    dist.all_reduce(products, group=mesh.ep)
    assert abs(products[0] - products[1]) < 1e-12
    home_ND = all_to_all_rows(there_RD, sent, received, mesh.ep.group_name)
    assert torch.equal(home_ND, x_ND), "there and back is the identity, bit for bit"


CHECKS = (check_cost, check_network, check_padded_cost, check_padded_does_not_wait, check_padded_without_limit)


def check_layouts(world: World) -> None:
    for ep in (1, 2, 4):
        if world.size % ep == 0:
            mesh = build_mesh(world, ep)
            for padded in (False, True):
                check_equal_to_local(mesh, padded)
                check_identity(mesh, padded)
            for check in CHECKS:
                check(mesh)
            check_adjoint(mesh)


def test_traps_21_22_29_groups_of_one_two_and_four_ranks() -> None:
    run_ranks(check_layouts, 4)


def test_a_layout_without_expert_parallelism_stays_local() -> None:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        mesh = build_mesh(world, 1)
        assert exchange_for(mesh, EXPERTS, padded=False) == LocalExchange(EXPERTS)
        assert exchange_for(mesh, EXPERTS, padded=True).unpadded == LocalExchange(EXPERTS)
        check_layouts(world)
