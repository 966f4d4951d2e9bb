"""What was decided in the forward pass is not decided again, whatever the numbers have become by then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_cases import ARCHITECTURES, GRAPH, MIXED, NO_LOSS, PLAIN
from layouts import IGNORE, Case
from remat_runs import MODES, model_of
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.peers import Alone
from moe_train.dist.world import World, joined
from moe_train.models.transformer import Transformer
from moe_train.moe.capacity import Capacity, Plan
from moe_train.moe.context import RoutingContext
from moe_train.moe.layer import MoELayer
from moe_train.moe.routing import Routing
from moe_train.parallel.remat import Recomputed, Remat, apply_remat, contexts

EACH_MODE = pytest.mark.parametrize("mode", MODES)
ROUTERS = [case for case in (*NO_LOSS, *MIXED) if not case.zero_router and case.text == "random"]
"""All twelve, with every rule of capacity; not those of which nothing is left when they are turned upside down."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


class Asking(Alone):
    """Peers that count how often they are asked, as if each time were a collective."""

    asked = 0

    def sum(self, x: Tensor) -> Tensor:
        Asking.asked += 1
        return super().sum(x)

    def before(self, x: Tensor) -> Tensor:
        Asking.asked += 1
        return super().before(x)

    def gather(self, x_TD: Tensor) -> tuple[Tensor, int]:
        Asking.asked += 1
        return super().gather(x_TD)


def integers_of(value: Any) -> list[Tensor]:
    """The tensors of integers and booleans in a structure of dataclasses."""
    if isinstance(value, Tensor):
        return [] if value.is_floating_point() else [value]
    return (
        [t for field in fields(value) for t in integers_of(getattr(value, field.name))] if is_dataclass(value) else []
    )


class Watch:
    """What the routers and capacities of a model said, each time they were asked."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.routings: list[list[Tensor]] = []
        self.plans: list[list[Tensor]] = []
        self.logits: list[Tensor] = []
        for layer in model.moe_layers.values():
            if isinstance(layer, MoELayer):
                layer.router.forward = self.noting(layer.router.forward)
        monkeypatch.setattr(Capacity, "plan", self.planning(Capacity.plan))

    def noting(self, forward: Callable[..., Routing]) -> Callable[..., Routing]:
        def noted(x_TD: Tensor, context: RoutingContext) -> Routing:
            routing = forward(x_TD, context)
            self.routings.append(integers_of(routing))
            self.logits.append(routing.logits_TE.detach())
            return routing

        return noted

    def planning(self, plan: Callable[..., Plan]) -> Callable[..., Plan]:
        def noted(*args: Any) -> Plan:
            planned = plan(*args)
            self.plans.append(integers_of(planned))
            return planned

        return noted


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def context_for(case: Case) -> tuple[Tensor, RoutingContext]:
    tokens_BS, labels_BS = case.batches()[0]
    valid_BS = labels_BS != IGNORE
    context = RoutingContext.of(tokens_BS, None if bool(valid_BS.all()) else valid_BS)
    return tokens_BS, replace(context, seed=3, peers=Asking())


def flip(model: Transformer) -> None:
    """Turn every preference of the routers into its opposite."""
    for layer in model.moe_layers.values():
        if isinstance(layer, MoELayer):
            for parameter in layer.router.parameters():
                parameter.data.neg_()
            if layer.router.bias_E is not None:
                layer.router.bias_E.neg_()


@EACH_MODE
@pytest.mark.parametrize("case", ROUTERS, ids=str)
def test_routers_that_changed_their_mind_are_not_asked(
    case: Case, mode: Remat, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes every router is turned upside down: scores follow, choices and places do not."""
    model = model_of(case, mesh, "fp64")
    watch = Watch(model, monkeypatch)
    apply_remat(model, mode)
    tokens_BS, context = context_for(case)
    with set_checkpoint_early_stop(False):  # else a router is left before it says what it would choose
        loss = model(tokens_BS, context).logits_BSV.square().sum()
    num_layers, asked = len(watch.routings), Asking.asked
    flip(model)
    loss.backward()
    is_hash = case.config().model.ffn.router.kind == "hash"
    if is_hash and mode == "selective":
        assert len(watch.routings) == num_layers, "it has no weights: nothing is to be computed again"
        return
    assert len(watch.routings) == 2 * num_layers, "nothing was computed again"
    for first, again in zip(watch.routings[:num_layers], reversed(watch.routings[num_layers:]), strict=True):
        assert same(first, again)
    if mode == "full":
        assert len(watch.plans) == 2 * num_layers
        for first, again in zip(watch.plans[:num_layers], reversed(watch.plans[num_layers:]), strict=True):
            assert same(first, again)
    assert Asking.asked == asked, "ranks were asked again"
    # The test could fail: the scores did change, and asked now, the routers choose otherwise.
    assert torch.equal(watch.logits[0], watch.logits[2 * num_layers - 1]) == is_hash
    model(tokens_BS, context)
    assert same(watch.routings[0], watch.routings[2 * num_layers]) == is_hash


def test_the_cases_cover_all_routers_and_ask_peers() -> None:
    assert len({case.config().model.ffn.router.kind for case in ROUTERS}) == 12
    assert any("scope=global" in key for case in ROUTERS for key in case.overrides)


@EACH_MODE
def test_a_second_backward_pass_decides_no_more(mode: Remat, mesh: Mesh) -> None:
    """Also when the graph is kept: the same gradients once more. Only `full`: torch keeps saved operators for one."""
    model = model_of(MIXED[0], mesh, "fp64")
    apply_remat(model, mode)
    tokens_BS, context = context_for(MIXED[0])
    loss = model(tokens_BS, context).logits_BSV.square().sum()
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    if mode == "selective":
        with pytest.raises(RuntimeError, match="backward an extra time"):
            loss.backward()
        return
    loss.backward()
    again = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(b, 2 * a) for a, b in zip(first, again, strict=True))


def peak_of(case: Case, mode: Remat, mesh: Mesh) -> int:
    """The most bytes that a forward and backward pass held."""
    from peak_memory import peak_bytes

    model = model_of(case, mesh, "fp32")
    apply_remat(model, mode)
    tokens_BS = torch.zeros(8, 48, dtype=torch.int64) + torch.arange(48) % 23

    def work() -> None:
        torch.autograd.backward(model(tokens_BS).logits_BSV.square().sum())

    work()  # gradients have their place
    return peak_bytes(work, torch.device("cpu"))


LARGER = ("model.dim=32", "model.layers=6", "model.ffn.expert_dim=64", "model.ffn.hidden_dim=96")
SIZES = [
    (Case("sparse", LARGER), 0.65, 0.5),  # experts keep little anyway: what the first product makes
    (Case("dense", (*LARGER, "model.ffn.num_experts=0")), 0.6, 0.4),
    (Case("shared, latent", (*LARGER, "model.ffn.num_shared_experts=2", *ARCHITECTURES[0].overrides[:5])), 0.65, 0.4),
    (Case("graph of networks", (*LARGER, "model=graph_tiny")), 0.7, 0.4),
    (Case("graph of blocks", (*LARGER, "model=graph_block_tiny")), 0.7, 0.4),
]


@pytest.mark.parametrize(("case", "selective", "full"), SIZES, ids=[case.name for case, _, _ in SIZES])
def test_less_is_held_at_once(
    case: Case, selective: float, full: float, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[3] / "scripts"), *sys.path])
    plain = peak_of(case, "none", mesh)
    shares = {mode: peak_of(case, mode, mesh) / plain for mode in MODES}
    assert shares["selective"] < selective, shares
    assert shares["full"] < full, shares


def test_nothing_is_kept_without_gradients() -> None:
    kept: list[Tensor] = []
    compute = Recomputed(lambda x: x.exp().exp())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), torch.no_grad():
        compute(torch.ones(3, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("saved", [(), (torch.ops.aten.exp.default,)])
def test_the_surroundings_may_be_entered_again(saved: tuple[Any, ...]) -> None:
    first, later = contexts(saved)
    with first:
        x = torch.ones(2).exp()
    for _ in range(2):
        with pytest.raises(KeyError), later:
            raise KeyError
    with later:
        again = torch.ones(2).exp()
    assert torch.equal(again, x)


def test_only_one_of_two_nested_parts_keeps_decisions() -> None:
    """The outer one: inside, everything is computed again as a whole."""
    passes: list[str] = []

    def innermost(x: Tensor) -> Tensor:
        passes.append("inner")
        return x.exp()

    inner = Recomputed(innermost)
    outer = Recomputed(lambda x: inner(x).exp())
    outer(torch.ones(2, requires_grad=True)).sum().backward()
    assert passes == ["inner", "inner"]


def test_graphs_that_recompute_by_themselves_are_left_to_it(mesh: Mesh) -> None:
    model = model_of(GRAPH[2], mesh, "fp64")
    apply_remat(model, "selective")
    changed = {name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Recomputed)}
    assert changed == set()
    plain = model_of(PLAIN[0], mesh, "fp64")
    apply_remat(plain, "selective")
    changed = {name for name, module in plain.named_modules() if isinstance(vars(module).get("forward"), Recomputed)}
    assert changed == {f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("router", "experts")}
