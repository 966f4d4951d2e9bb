"""What a rank of the exchange suite times: tokens out and home, alone or within a whole layer, to and fro."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.benchmark.layer_ours import output_of
from moe_train.benchmark.layer_pass import LayerPass
from moe_train.benchmark.ranks import Abreast, join
from moe_train.benchmark.timing import Timed
from moe_train.benchmark.traffic import Watched, draw_plan, journey_bytes, logit_bias, metered
from moe_train.config.bench import BenchConfig, ExchangeBench, ExchangeKind, Routing, Shape
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import TopKSoftmaxRouterConfig
from moe_train.config.schema import LayoutConfig
from moe_train.dist import underway
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.build import build_moe
from moe_train.models.initialise import initialise
from moe_train.models.transformer import PRECISIONS
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange import Exchange, exchange_for
from moe_train.moe.layer import MoELayer

ALONE, LAYER = "tokens only", "layer"
"""What is timed."""


@dataclass(frozen=True)
class Way:
    """One variant of the suite.

    Attributes:
        routing: how tokens spread.
        work: `ALONE` or `LAYER`.
        kind: of the exchange.
        parts: in which tokens travel.
    """

    routing: Routing
    work: str
    kind: ExchangeKind
    parts: int

    @property
    def name(self) -> str:
        """By which a worker knows it."""
        return f"{self.routing}, {self.work}, {self.variant}"

    @property
    def variant(self) -> str:
        """By which the table knows it."""
        return f"{self.kind}, {self.parts} part{'s' if self.parts > 1 else ''}"


def ways_of(bench: ExchangeBench) -> list[Way]:
    """Return all variants; without the hierarchical exchange where nodes do not divide the ranks into several."""
    works = (ALONE, LAYER) if bench.layer else (ALONE,)
    ways = (Way(*chosen) for chosen in product(bench.routing, works, bench.kinds, bench.overlap))
    return [way for way in ways if way.kind != "hierarchical" or has_nodes(bench)]


def has_nodes(bench: ExchangeBench) -> bool:
    """Whether the ranks fill several nodes of more than one rank."""
    return bench.node_size is not None and 1 < bench.node_size < bench.ranks and bench.ranks % bench.node_size == 0


def node_size_of(bench: ExchangeBench) -> int:
    """Return the ranks of a node."""
    return bench.node_size if bench.node_size and has_nodes(bench) else bench.ranks


class RoundTrip:
    """Tokens out to the ranks of their experts and home, and their gradients the same way.

    Experts are left out: what comes home is each token times the sum of its weights, added up in parts where the
    experts would be. So the result is known, and the weights travel as they do in a layer.

    Args:
        exchange: brings tokens there.
        plan: where they go; its weights are a leaf.
        x_TD: [T, D] tokens, a leaf.
        grad_TD: [T, D] gradient of the sums that come home.
    """

    def __init__(self, exchange: Exchange, plan: Plan, x_TD: Tensor, grad_TD: Tensor) -> None:
        self.exchange, self.plan, self.x_TD, self.grad_TD = exchange, plan, x_TD, grad_TD

    def forward(self) -> Tensor:
        """Go out and home."""
        held = len(self.exchange.experts)
        transit = self.exchange.dispatch(self.x_TD, self.plan)
        for arrived in transit:
            weights_RK = arrived.weights_RK.masked_fill(arrived.experts_RK >= held, 0.0)
            sum_R1 = weights_RK.sum(dim=1, keepdim=True).to(arrived.rows_RD.dtype)
            transit.send_home(arrived.rows_RD * sum_R1, arrived)
        return transit.home()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Go there and back; return the sums and the gradients of tokens and weights."""
        y_TD = self.forward()
        x_grad_TD, weights_grad_TK = torch.autograd.grad(y_TD, (self.x_TD, self.plan.weights_TK), self.grad_TD)
        return y_TD, x_grad_TD, weights_grad_TK

    def error(self) -> float:
        """Return the largest relative L2 error of the three results against fp64 without an exchange. Collective."""
        x_TD, grad_TD = self.x_TD.detach().double(), self.grad_TD.double()
        sum_T1 = self.plan.weights_TK.detach().double().sum(dim=1, keepdim=True)
        weights_grad_TK = (x_TD * grad_TD).sum(dim=1, keepdim=True).expand_as(self.plan.weights_TK)
        truths = (x_TD * sum_T1, grad_TD * sum_T1, weights_grad_TK)
        return max(
            float((found.detach().double() - truth).norm() / truth.norm())
            for found, truth in zip(self(), truths, strict=True)
        )


@dataclass(frozen=True)
class Rank:
    """What a rank knows of its suite.

    Attributes:
        bench: the suite.
        shape: of the experts.
        dtype: of tokens.
        seed: of all draws.
        world: the ranks.
        mesh: their groups.
    """

    bench: ExchangeBench
    shape: Shape
    dtype: torch.dtype
    seed: int
    world: World
    mesh: Mesh

    def tokens(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Return this rank's random tokens, a leaf, and gradients of what is made of them."""
        generator = torch.Generator().manual_seed(self.seed * self.world.size + self.world.rank)
        x, grad = (torch.randn(*shape, self.bench.dim, generator=generator).to(self.dtype) for _ in range(2))
        return x.requires_grad_(), grad

    def exchange(self, way: Way) -> Exchange:
        """Return the exchange of a variant. Collective."""
        config = LayoutConfig(
            ep=self.world.size, exchange=way.kind, overlap=way.parts, node_size=node_size_of(self.bench)
        )
        return exchange_for(self.mesh, self.shape.experts, False, config, self.shape.top_k)

    def round_trip(self, way: Way, exchange: Exchange) -> RoundTrip:
        """Return tokens out and home."""
        generator = torch.Generator().manual_seed(1 + self.seed * self.world.size + self.world.rank)
        plan = draw_plan(way.routing, self.bench.tokens, self.shape.experts, self.shape.top_k, generator)
        return RoundTrip(exchange, plan, *self.tokens(self.bench.tokens))

    def layer_pass(self, way: Way, exchange: Exchange) -> LayerPass:
        """Return a whole layer."""
        layer = routed_layer(self.bench.dim, self.shape, way.routing, exchange, self.seed, self.bench.shared)
        return LayerPass(partial(output_of, layer), tuple(layer.parameters()), *self.tokens(1, self.bench.tokens))

    def variant(self, way: Way) -> Mapping[str, Timed | float]:
        """Build a variant and its facts. Collective."""
        place = (self.shape.experts, self.world.rank, self.world.size, node_size_of(self.bench))
        watched = Watched(self.exchange(way), *place)
        work = self.round_trip(way, watched) if way.work == ALONE else self.layer_pass(way, watched)
        work()  # the first pass makes what later ones keep
        watched.watches = True
        work()
        watched.watches = False
        visits = watched.seen.of_all(self.world)
        once = journey_bytes(self.bench.dim, self.shape.top_k, self.dtype.itemsize)
        moved = metered(work, self.world, visits.journeys(way.kind, self.world.size) * once, visits.tokens)
        facts = dict(moved.facts)
        if isinstance(work, RoundTrip):
            facts["error"] = max(float(str(e)) for e in self.world.gather(work.error()))
        return {way.name: Abreast(self.world, work), **{f"{way.name}:{name}": fact for name, fact in facts.items()}}


def routed_layer(
    dim: int, shape: Shape, routing: Routing, exchange: Exchange, seed: int, shared: bool = False
) -> MoELayer:
    """Return a layer with values whose tokens, if they are standard normal, spread as asked for.

    Logits are standard normal, too, with a bias as `draw_plan` has it.
    """
    ffn = FFNConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        expert_dim=shape.expert_dim,
        num_shared_experts=int(shared),
        router=TopKSoftmaxRouterConfig(bias=True),
    )
    layer = build_moe(ModelConfig(dim=dim, ffn=ffn), exchange, out_std=0.02)
    initialise(layer, seed)
    assert isinstance(layer.router, nn.Module), "a router with weights"
    values = {"weight": torch.randn(shape.experts, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5}
    values["logit_bias_E"] = logit_bias(routing, shape.experts)
    layer.router.load_state_dict(values)
    return layer


def build(arguments: Mapping[str, Any]) -> Mapping[str, Timed | float]:
    """Build the variants of one shape on one rank: a builder of workers.

    Args:
        arguments: ``config`` (a `BenchConfig` as JSON), ``shape`` (its index) and what `join` takes.
    """
    config = BenchConfig.model_validate(arguments["config"])
    bench = config.bench
    assert isinstance(bench, ExchangeBench), "this is the exchange suite's"
    world = join(arguments)
    if bench.latency_ms:
        delay(bench.latency_ms / 1e3)
    dtype = PRECISIONS[config.precision].activations
    rank = Rank(bench, bench.shapes[arguments["shape"]], dtype, config.seed, world, build_mesh(world, world.size))
    built: dict[str, Timed | float] = {}
    for way in ways_of(bench):
        built |= rank.variant(way)
    return built


class Late:
    """A collective that arrives some time after it was started, however early it is waited for.

    Args:
        work: the collective.
        latency_s: that time.
    """

    def __init__(self, work: dist.Work, latency_s: float) -> None:
        self._work, self._due_s = work, time.perf_counter() + latency_s

    def wait(self) -> None:
        """Wait for the collective and for its time."""
        self._work.wait()
        time.sleep(max(0.0, self._due_s - time.perf_counter()))

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return time.perf_counter() >= self._due_s and self._work.is_completed()


def delay(latency_s: float) -> None:
    """Let all that is started in this process from here on arrive late."""
    true = underway.Flight

    def delayed(work: Any, tensors: Any) -> underway.Flight:
        return true(Late(work, latency_s), tensors)  # type: ignore[arg-type]

    underway.Flight = delayed  # type: ignore[misc, assignment]
