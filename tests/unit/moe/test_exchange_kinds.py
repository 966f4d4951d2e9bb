"""Every exchange, whole and in parts: equal to having all experts here, at the price that its formula says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from moe_samples import DIM, IdentityExperts, context_of, make_layer, tokens
from spawn import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from waiting import WAITING

from moe_train.config.routing import DroplessConfig, FactorCapacityConfig
from moe_train.config.schema import LayoutConfig
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.meter import METER
from moe_train.dist.underway import FLIGHTS, GRADIENTS
from moe_train.dist.world import World
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange import Exchange, LocalExchange, exchange_for
from moe_train.moe.layer import MoELayer

BATCH, LENGTH, EXPERTS = 2, 5, 8
NUM_TOKENS = BATCH * LENGTH
FP64, INT32 = 8, 4
KINDS = ("alltoall", "hierarchical", "allgather")
PARTS = (1, 3)
MANY = 12
"""Parts of ten tokens: some are empty."""
NODE = 2
STARTS = {
    getattr(torch.ops.moe_train, name).default for name in ("start_visits", "start_return", "start_gather", "start_sum")
}


@dataclass(frozen=True)
class Case:
    """One layer and its tokens."""

    name: str
    top_k: int = 2
    factor: float | None = None
    zero_router: bool = False
    silent_ranks: tuple[int, ...] = ()
    shared: bool = False


CASES = [
    Case("top-1", top_k=1),
    Case("top-3 and a shared expert", top_k=3, shared=True),
    Case("every expert", top_k=EXPERTS),
    Case("all tokens to one expert", top_k=1, zero_router=True),
    Case("with drops", factor=0.6),
    Case("nothing from a rank, nothing to others", zero_router=True, silent_ranks=(1,)),
    Case("nothing at all", silent_ranks=(0, 1, 2, 3)),
]


def exchanges_of(mesh: Mesh, parts: tuple[int, ...] = PARTS) -> Iterator[tuple[str, Exchange]]:
    """All kinds that the size of the group allows, in every number of parts."""
    for kind in KINDS:
        if kind == "hierarchical" and mesh.layout.ep <= NODE:
            continue
        for num in parts:
            config = LayoutConfig(ep=mesh.layout.ep, exchange=kind, node_size=NODE, overlap=num, timeout_s=30.0)
            yield f"{kind} in {num}", exchange_for(mesh, EXPERTS, False, config)


def layer_of(case: Case, exchange: Exchange) -> MoELayer:
    fields = {"factor": case.factor or 1.0, "scope": "sequence"}
    capacity = DroplessConfig() if case.factor is None else FactorCapacityConfig.model_validate(fields)
    layer = make_layer(EXPERTS, case.top_k, capacity, exchange=exchange)
    if case.zero_router:
        nn.init.zeros_(layer.router.weight)
    if case.shared:
        layer.shared = nn.Linear(DIM, DIM).double()
        for index, parameter in enumerate(layer.shared.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)
            parameter.data.copy_((values + index).sin())
    return layer


def results_of(layer: MoELayer, case: Case, rank: int, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens; ``call`` computes the layer."""
    x_BSD = tokens(BATCH, LENGTH, seed=rank)
    context = context_of(BATCH, LENGTH, torch.full((BATCH, LENGTH), rank not in case.silent_ranks))

    def compute(x_BSD: Tensor) -> Tensor:
        return layer(x_BSD, context).y_BSD

    y_BSD = compute(x_BSD) if call is None else call(compute, x_BSD)
    (y_BSD * tokens(BATCH, LENGTH, seed=100 + rank).detach()).sum().backward()
    return {"output": y_BSD.detach(), "input": x_BSD.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def expected_of(case: Case, mesh: Mesh) -> dict[str, Tensor]:
    """What the layer does with all experts here; these get gradients from the whole group."""
    results = results_of(layer_of(case, LocalExchange(EXPERTS)), case, mesh.rank)
    held = mesh.layout.experts(mesh.rank, EXPERTS)
    for name in results:
        if name.startswith("experts."):
            dist.all_reduce(results[name], group=mesh.ep)
            results[name] = results[name][held.start : held.stop]
    return results


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error < 1e-12, f"{where}: {name} differs by {error:.1e}"
    assert not FLIGHTS, f"{where}: nobody waited for a collective"
    assert not GRADIENTS, where


def check_equal_to_local(mesh: Mesh) -> None:
    for case in CASES:
        expected = expected_of(case, mesh)
        for kind, exchange in exchanges_of(mesh, (*PARTS, MANY) if case.factor else PARTS):
            found = results_of(layer_of(case, exchange), case, mesh.rank)
            assert_equal(found, expected, f"{case.name}, {kind}, group of {mesh.layout.ep}, rank {mesh.rank}")


def check_recomputed(mesh: Mesh) -> None:
    """Under a checkpoint that keeps nothing, tokens travel again; under one that keeps what came, they do not.

    The second pass of the first ends before what it started has come home; that is forgotten in the end.
    """
    for case in (CASES[1], CASES[5]):
        expected = expected_of(case, mesh)
        for kind, exchange in exchanges_of(mesh, parts=(1, 3)):
            calls = Counter()
            for way in ("none", "full", "selective"):
                METER.take_ms()
                found = results_of(layer_of(case, exchange), case, mesh.rank, WAYS[way])
                calls[way] = METER.calls
                dist.barrier(mesh.ep)
                exchange_leftovers()
                assert_equal(found, expected, f"{case.name}, {kind}, {way}, group of {mesh.layout.ep}")
            assert calls["none"] == calls["selective"] < calls["full"], (kind, calls)


def exchange_leftovers() -> None:
    for address in list(FLIGHTS):
        FLIGHTS.pop(address).work.wait()


def keep(context: object, operator: object, *args: object, **kwargs: object) -> object:
    return CheckpointPolicy.MUST_SAVE if operator in STARTS else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "full": lambda compute, x_BSD: checkpoint(compute, x_BSD, use_reentrant=False),
    "selective": lambda compute, x_BSD: checkpoint(
        compute, x_BSD, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep)
    ),
}


def check_without_gradients(mesh: Mesh) -> None:
    case = CASES[1]
    for kind, exchange in exchanges_of(mesh):
        layer = layer_of(case, exchange)
        with torch.no_grad():
            y_BSD = layer(tokens(BATCH, LENGTH, seed=mesh.rank)).y_BSD
        local_BSD = layer_of(case, LocalExchange(EXPERTS))(tokens(BATCH, LENGTH, seed=mesh.rank)).y_BSD
        assert torch.allclose(y_BSD, local_BSD, rtol=0, atol=1e-12), kind
        assert not FLIGHTS


class Waits(TorchDispatchMode):
    """Counts the times that the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and has_mask(args)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def has_mask(args: tuple[Any, ...]) -> bool:
    return isinstance(args[1], list) and any(t is not None and t.dtype == torch.bool for t in args[1])


@contextmanager
def counting_waits() -> Iterator[list[str]]:
    """`tolist` reads the memory of the CPU unseen, where a device would have to be asked."""
    true_tolist = torch.Tensor.tolist
    with Waits() as waits:

        def tolist(tensor: Tensor) -> Any:
            waits.names.append("tolist")
            return true_tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        try:
            yield waits.names
        finally:
            torch.Tensor.tolist = true_tolist  # type: ignore[method-assign]


def plan_of(layer: MoELayer, x_BSD: Tensor) -> Plan:
    context = context_of(BATCH, LENGTH)
    return layer.capacity.plan(layer.router(x_BSD.flatten(0, 1), context), context, training=True)


def check_waits(mesh: Mesh) -> None:
    """Each exchange makes the host wait once per layer, in however many parts, and never backwards."""
    for kind, exchange in exchanges_of(mesh):
        layer = layer_of(CASES[4], exchange)
        layer.experts = IdentityExperts(EXPERTS // mesh.ep.size())
        x_BSD = tokens(BATCH, LENGTH, seed=mesh.rank)
        plan = plan_of(layer, x_BSD)
        with counting_waits() as waits:
            transit = exchange.dispatch(x_BSD.flatten(0, 1), plan)
            for arrived in transit:
                transit.send_home(layer.experts(arrived), arrived)
            y_TD = transit.home()
            y_TD.backward(torch.ones_like(y_TD))
        assert waits == ["tolist"], (kind, waits)


def check_bytes(mesh: Mesh) -> None:
    """Out: a row, K ids, K weights for each visit of another rank or node; home: a row. Back: all but the ids."""
    ep, own, top_k = mesh.layout.ep, mesh.ep_rank, 3
    for zero_router in (False, True):
        for kind, exchange in exchanges_of(mesh, parts=(1, 3)):
            layer = layer_of(Case("bytes", top_k, zero_router=zero_router), exchange)
            x_BSD = tokens(BATCH, LENGTH, seed=mesh.rank)
            plan = plan_of(layer, x_BSD)
            homes = [{e * ep // EXPERTS for e in experts} for experts in plan.experts_TK.tolist()]
            if kind.startswith("allgather"):
                homes = [set(range(ep))] * NUM_TOKENS
            out, home = DIM * FP64 + top_k * FP64, DIM * FP64
            far = sum(p // NODE != own // NODE for ranks in homes for p in ranks)
            if kind.startswith("hierarchical"):
                far = sum(node != own // NODE for ranks in homes for node in {p // NODE for p in ranks})
            METER.take_ms()
            y_BSD = layer(x_BSD, context_of(BATCH, LENGTH)).y_BSD
            forward = torch.tensor(METER.between_bytes)
            y_BSD.sum().backward()
            total = torch.tensor(METER.between_bytes)
            METER.take_ms()
            # What one rank sends out comes home from others: only the sum over the ranks is known from the plans.
            expected = torch.tensor(far * (out + top_k * INT32 + home))
            for number in (forward, total, expected):
                dist.all_reduce(number, group=mesh.ep)
            assert forward == expected, (kind, ep, forward, expected)
            again = torch.tensor(far * (out + home))
            dist.all_reduce(again, group=mesh.ep)
            assert total == forward + again, (kind, ep)
            assert (forward > 0) == (ep > NODE)


CHECKS = (check_equal_to_local, check_recomputed, check_without_gradients, check_waits, check_bytes)


def check_layouts(world: World) -> None:
    torch.set_num_threads(1)
    for ep in (1, 2, 4):
        mesh = build_mesh(world, ep)
        if ep == 1:
            config = LayoutConfig(exchange="allgather", overlap=3)
            assert exchange_for(mesh, EXPERTS, False, config) == LocalExchange(EXPERTS)
            continue
        for check in CHECKS:
            check(mesh)


def test_every_exchange_on_four_ranks() -> None:
    run_ranks(check_layouts, 4)
