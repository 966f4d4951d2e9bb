"""The points of the scaling suite's curves: layers and blocks of growing size, as variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from moe_train.benchmark.journeys import routed_layer
from moe_train.benchmark.layer_ours import output_of
from moe_train.benchmark.layer_pass import LayerPass
from moe_train.benchmark.ranks import Abreast, join
from moe_train.benchmark.timing import Here, Timed
from moe_train.config.bench import BenchConfig, ScalingBench, Shape
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.dist.mesh import build_mesh
from moe_train.models.attention import rotary_width
from moe_train.models.blocks import Block
from moe_train.models.build import build_block
from moe_train.models.initialise import initialise
from moe_train.models.transformer import PRECISIONS
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange, exchange_for
from moe_train.ops.rotary import rotary_table

Curve: TypeAlias = Literal["experts", "tokens", "length", "ep"]
"""What grows."""
CURVES: tuple[Curve, ...] = get_args(Curve)
HEAD_WIDTH = 64
"""Of the block's attention."""


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        curve: which.
        x: what grows, there.
        tokens: per call, over all ranks.
        length: positions of a sequence; matters to attention only.
    """

    curve: Curve
    x: int
    tokens: int
    length: int

    @property
    def name(self) -> str:
        """By which the table and a worker know it."""
        told = {"experts": "E", "tokens": "T", "length": "S", "ep": "EP"}
        return f"{told[self.curve]}={self.x}"


def points_of(bench: ScalingBench, curve: Curve) -> list[Point]:
    """Return the points of a curve, in the order of the configuration."""
    middle = middle_of(bench.tokens)
    match curve:
        case "experts":
            return [Point(curve, x, middle, middle) for x in bench.experts]
        case "tokens":
            return [Point(curve, x, x, x) for x in bench.tokens]
        case "length":
            return [Point(curve, x, x * max(1, middle // x), x) for x in bench.seq_lens]
        case "ep":
            return [Point(curve, x, middle, middle) for x in bench.eps]


def middle_of(values: tuple[int, ...]) -> int:
    """Return the one in the middle, the first of two."""
    return values[(len(values) - 1) // 2]


def shape_of(bench: ScalingBench, point: Point) -> Shape:
    """Return the experts of a point."""
    experts = point.x if point.curve == "experts" else bench.experts[0]
    return Shape(experts=experts, top_k=bench.top_k, expert_dim=bench.expert_dim)


@dataclass(frozen=True)
class Builder:
    """Makes the variants of one process.

    Attributes:
        bench: the suite.
        dtype: of tokens.
        seed: of all draws.
    """

    bench: ScalingBench
    dtype: torch.dtype
    seed: int

    def tokens(self, batch: int, length: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Return standard normal tokens [B, S, D], a leaf, and gradients of what is made of them."""
        generator = torch.Generator().manual_seed(self.seed + rank)
        x, grad = (torch.randn(batch, length, self.bench.dim, generator=generator).to(self.dtype) for _ in range(2))
        return x.requires_grad_(), grad

    def layer(self, point: Point) -> LayerPass:
        """Return a layer in this process."""
        shape = shape_of(self.bench, point)
        layer = routed_layer(self.bench.dim, shape, "balanced", LocalExchange(shape.experts), self.seed)
        return LayerPass(partial(output_of, layer), tuple(layer.parameters()), *self.tokens(1, point.tokens))

    def block(self, point: Point) -> LayerPass:
        """Return a whole block: norms, attention and layer."""
        shape = shape_of(self.bench, point)
        ffn = FFNConfig(num_experts=shape.experts, top_k=shape.top_k, expert_dim=shape.expert_dim)
        model = ModelConfig(dim=self.bench.dim, layers=1, heads=max(1, self.bench.dim // HEAD_WIDTH), ffn=ffn)
        block = build_block(model, 0, LocalExchange(shape.experts))
        assert isinstance(block, Block), "a sparse layer stands in one"
        initialise(block, self.seed)
        batch = point.tokens // point.length
        device, precise = torch.device("cpu"), torch.promote_types(self.dtype, torch.float32)
        rotary = rotary_table(point.length, rotary_width(model), model.attention, precise, device)
        context = RoutingContext.of(torch.arange(point.tokens).view(batch, point.length))

        def output(x_BSD: Tensor) -> Tensor:
            y_BSD: Tensor = block(x_BSD, rotary, context).x_BSD
            return y_BSD

        return LayerPass(output, tuple(block.parameters()), *self.tokens(batch, point.length))


def build(arguments: Mapping[str, Any]) -> Mapping[str, Timed | float]:
    """Build the points of a curve in one process: a builder of workers.

    Args:
        arguments: ``config`` (a `BenchConfig` as JSON) and ``curve``, not ``ep``.
    """
    builder, curve = parse(arguments)
    make = builder.block if curve == "length" else builder.layer
    return {point.name: Here(make(point)) for point in points_of(builder.bench, curve)}


def build_rank(arguments: Mapping[str, Any]) -> Mapping[str, Timed | float]:
    """Build this rank's part of the point of the EP curve that has so many ranks: a builder of workers.

    Args:
        arguments: ``config`` (a `BenchConfig` as JSON), ``curve`` and what `join` takes.
    """
    builder, curve = parse(arguments)
    world = join(arguments)
    point = next(point for point in points_of(builder.bench, curve) if point.x == world.size)
    shape = shape_of(builder.bench, point)
    exchange = exchange_for(build_mesh(world, world.size), shape.experts, False, top_k=shape.top_k)
    layer = routed_layer(builder.bench.dim, shape, "balanced", exchange, builder.seed)
    tokens = builder.tokens(1, point.tokens // world.size, world.rank)
    work = LayerPass(partial(output_of, layer), tuple(layer.parameters()), *tokens)
    return {point.name: Abreast(world, work)}


def parse(arguments: Mapping[str, Any]) -> tuple[Builder, Curve]:
    """Return what makes the variants, and the curve."""
    config = BenchConfig.model_validate(arguments["config"])
    assert isinstance(config.bench, ScalingBench), "this is the scaling suite's"
    return Builder(config.bench, PRECISIONS[config.precision].activations, config.seed), arguments["curve"]
