"""One layer, forwards and backwards, beside the dense network of equal active FLOPs and other people's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moe_train.benchmark import layer_ours
from moe_train.benchmark.allocators import allocators, threads_of
from moe_train.benchmark.fleet import Fleet, Program, beside
from moe_train.benchmark.layer_case import LayerCase, shape_label
from moe_train.benchmark.layer_ours import DENSE, FUSED
from moe_train.benchmark.peers.registry import LAYERS, programs
from moe_train.benchmark.results import Row, SuiteResult, growing
from moe_train.config.bench import BenchConfig, LayerBench, Shape

ABOUT: Final = (
    "One forward and one backward pass with a gradient made before; tokens require a gradient; routers and "
    "whatever stands around the experts included. `dense` is the SwiGLU network of equal active FLOPs (hidden "
    "width K·F), with fp32 weights cast in each pass, as this project's layer has them and the trainer keeps "
    "them; with `bf16 weights` nothing is cast, as in the peers. `routed ahead` leaves the router's own work out; "
    "`fused` is train.compile=pointwise. Errors are relative L2 errors against the same sums in fp64 by the same "
    "choice of experts; `same routing` is the share of that choice that fp64 logits make, too."
)


def run(config: BenchConfig) -> Iterator[SuiteResult]:
    """Time every shape under every routing; yield what is known after each."""
    bench = config.bench
    assert isinstance(bench, LayerBench), "the door chooses the suite by its kind"
    everyone = [*(ours(bench, way) for way in bench.compile), *programs(LAYERS, bench.peers)]
    cases = [
        (shape, LayerCase.of(config, bench, shape, routing)) for shape in bench.shapes for routing in bench.routing
    ]
    with Fleet(everyone, threads_of(config.threads), config.timeout_s) as fleet:
        timed = (rows_of(fleet, config, shape, case) for shape, case in cases)
        yield from growing("layer", ABOUT, f"{DENSE}{FUSED[bench.compile[0]]}", timed)


def ours(bench: LayerBench, compile: str) -> Program:
    """Return this project's layer and its dense twin, in a process of its own for each value of train.compile."""
    own = {"compute": list(bench.compute), "compile": compile}
    return Program(f"ours{FUSED[compile]}", f"{layer_ours.__name__}:build", own, {"tuned": allocators()["tuned"]})


def rows_of(fleet: Fleet, config: BenchConfig, shape: Shape, case: LayerCase) -> list[Row]:
    """Time one case."""
    found = fleet.time({"case": case.arguments()}, config.rounds, config.warmup)
    labels = {"shape": shape_label(shape), "routing": case.routing}
    return beside((row for one in found for row in one.rows(labels)), "ours", LAYERS)
