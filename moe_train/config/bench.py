"""The keys of the benchmarks: what is timed beside what, and how often."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moe_train.config.base import Strict
from moe_train.config.model import Compute

Routing: TypeAlias = Literal["balanced", "zipf"]
"""balanced: a random router, about equally full experts; zipf: the r-th expert's logit is lower by log r."""
Peer: TypeAlias = Literal["transformers_eager", "transformers_grouped_mm", "deepspeed", "torchtitan"]
"""Other people's layers and models, timed where their packages are installed."""
ExchangeKind: TypeAlias = Literal["alltoall", "allgather", "hierarchical"]
"""Ways of tokens to experts on other ranks (`parallel.exchange`)."""
EXCHANGES: tuple[ExchangeKind, ...] = ("alltoall", "allgather", "hierarchical")
LayerPeers: tuple[Peer, ...] = ("transformers_eager", "transformers_grouped_mm", "deepspeed", "torchtitan")
ModelPeers: tuple[Peer, ...] = ("transformers_eager", "transformers_grouped_mm")


class Shape(Strict):
    """Experts of one layer."""

    experts: PositiveInt
    """Number of experts E."""
    top_k: PositiveInt
    """Experts per token K."""
    expert_dim: PositiveInt
    """Hidden width F of one expert; the dense twin has K · F."""


SHAPES = (
    Shape(experts=8, top_k=2, expert_dim=1024),
    Shape(experts=64, top_k=6, expert_dim=192),
    Shape(experts=128, top_k=8, expert_dim=128),
)


class LayerBench(Strict):
    """One layer, forwards and backwards, beside the dense SwiGLU network of equal active FLOPs."""

    kind: Literal["layer"] = "layer"
    """Suite."""
    shapes: Annotated[tuple[Shape, ...], Field(strict=False, min_length=1)] = SHAPES
    """Experts."""
    tokens: PositiveInt = 4096
    """Tokens per call."""
    dim: PositiveInt = 512
    """Width of a token."""
    routing: Annotated[tuple[Routing, ...], Field(strict=False, min_length=1)] = ("balanced", "zipf")
    """How tokens spread over experts."""
    compute: Annotated[tuple[Compute, ...], Field(strict=False, min_length=1)] = ("auto",)
    """Ways of this project to compute experts."""
    compile: Annotated[tuple[Literal["none", "pointwise"], ...], Field(strict=False, min_length=1)] = (
        "none",
        "pointwise",
    )
    """Values of train.compile to try, for this project's layer and its dense twin."""
    peers: Annotated[tuple[Peer, ...], Field(strict=False)] = LayerPeers
    """Others beside it."""


class ModelBench(Strict):
    """A whole training step: forward, loss, backward, gradient norm, optimizer."""

    kind: Literal["model"] = "model"
    """Suite."""
    shapes: Annotated[tuple[Shape, ...], Field(strict=False, min_length=1)] = SHAPES[:2]
    """Experts of every layer."""
    layers: PositiveInt = 4
    """Blocks."""
    dim: PositiveInt = 512
    """Width of the residual stream."""
    heads: PositiveInt = 8
    """Heads."""
    vocab_size: PositiveInt = 8192
    """Tokens of the vocabulary."""
    seq_len: PositiveInt = 512
    """Positions per sequence."""
    batch: PositiveInt = 8
    """Sequences per step."""
    compile: Annotated[tuple[Literal["none", "pointwise", "block"], ...], Field(strict=False, min_length=1)] = ("none",)
    """Values of train.compile to try."""
    peers: Annotated[tuple[Peer, ...], Field(strict=False)] = ModelPeers
    """Others beside it."""


class ExchangeBench(Strict):
    """Tokens to their experts and home, by each kind of exchange, without experts; bytes against the closed form."""

    kind: Literal["exchange"] = "exchange"
    """Suite."""
    shapes: Annotated[tuple[Shape, ...], Field(strict=False, min_length=1)] = SHAPES[:2]
    """Experts."""
    ranks: PositiveInt = 2
    """Processes, one EP group."""
    node_size: PositiveInt | None = None
    """Ranks of a node; null: all. Where it divides the ranks, the hierarchical exchange is timed, too."""
    tokens: PositiveInt = 2048
    """Tokens per rank and call."""
    dim: PositiveInt = 512
    """Width of a token."""
    routing: Annotated[tuple[Routing, ...], Field(strict=False, min_length=1)] = ("balanced", "zipf")
    """How tokens spread over experts."""
    kinds: Annotated[tuple[ExchangeKind, ...], Field(strict=False, min_length=1)] = EXCHANGES
    """Values of parallel.exchange; the first is what the others are compared with."""
    overlap: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (1, 2, 4)
    """Values of parallel.overlap: parts in which tokens travel."""
    layer: bool = False
    """Whether the whole layer is timed, too: its experts work while other parts travel."""
    shared: bool = False
    """Whether that layer has a shared expert, which works while tokens travel."""
    latency_ms: NonNegativeFloat = 0.0
    """Stands for a slow network: whatever is started arrives this much later, in which time other work may be done."""


class ClusterBench(ModelBench):
    """The same global batch on one process with many threads, and on several with one thread each."""

    kind: Literal["cluster"] = "cluster"  # type: ignore[assignment]
    """Suite."""
    ranks: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (2,)
    """Numbers of processes; each is one EP group and shares the cores evenly."""


class ScalingBench(Strict):
    """What a layer costs against its number of experts, the tokens, the length of texts and the EP size."""

    kind: Literal["scaling"] = "scaling"
    """Suite."""
    experts: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (8, 16, 32, 64, 128)
    """Numbers of experts, at equal K and equal active FLOPs; the other curves have the first."""
    top_k: PositiveInt = 2
    """Experts per token on that curve and the others."""
    expert_dim: PositiveInt = 512
    """Hidden width of an expert."""
    tokens: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (1024, 4096, 16_384, 65_536)
    """Tokens per call; the other curves have the middle one, the lower of two."""
    seq_lens: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (128, 256, 512, 1024, 2048)
    """Positions per sequence of a whole block, at equal tokens per call."""
    eps: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (1, 2, 4)
    """EP sizes, in as many processes of one thread, at equal tokens over all."""
    dim: PositiveInt = 512
    """Width of a token."""


Suite: TypeAlias = Annotated[
    LayerBench | ModelBench | ExchangeBench | ClusterBench | ScalingBench, Field(discriminator="kind")
]


class BenchConfig(Strict):
    """Configuration of ``moe_train.bench``."""

    bench: Suite = LayerBench()
    """What is timed."""
    rounds: PositiveInt = 7
    """Rounds; in each, every variant runs once, in an order that turns."""
    warmup: PositiveInt = 2
    """Rounds before them that do not count."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of activations; weights are fp32 where the trainer's are."""
    threads: PositiveInt | None = None
    """Threads of a process, where a suite does not say; null: as many as cores."""
    seed: int = 0
    """Seed of weights and tokens."""
    timeout_s: PositiveFloat = 900.0
    """Longest wait for a process to build what it times, or to run it once, in seconds; it is then given up."""
    out: str = "bench"
    """Folder for SUITE.json (every single time) and SUITE.md (the table)."""
