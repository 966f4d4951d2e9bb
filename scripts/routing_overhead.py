"""Measures what routing costs: the time of each part of a MoE layer, forward and backward, as a share of the layer's.

Usage: python scripts/routing_overhead.py [--experts 8 16 ...] [--choices 2 8] [--tokens 2048] [--repeats 15]

One thread of a CPU, fp32, EP=1. The sizes take turns, so that a disturbance of the machine hits all of them; times are
medians. The active FLOPs are the same for all: with K choices an expert has the K-th part of 512 hidden units.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_train.config.balance import AuxLossConfig, BalanceConfig, ZLossConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import FactorCapacityConfig, TopKRouterConfig
from moe_train.models.build import build_moe
from moe_train.models.initialise import initialise
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.layer import MoELayer
from moe_train.ops.permute import gather_rows, map_rows, sum_rows

DIM, ACTIVE_WIDTH, LENGTH = 256, 512, 256
"""Width of a token, hidden units that a token uses over all its experts, positions per sequence."""
WARM_UP = 3
"""Rounds that do not count."""
OVERHEAD = ("router", "plan", "permute", "combine", "record")
"""Parts of the layer that a dense one does not have; the others are the experts' GEMMs."""


@dataclass(frozen=True)
class Size:
    """What is measured, and the times of its parts.

    Attributes:
        num_experts: experts E.
        top_k: choices K per token.
        parts: each forward and backward once; gradients add up in buffers that stay, as in a training.
        times_ms: measurements by part.
    """

    num_experts: int
    top_k: int
    parts: dict[str, Callable[[], None]]
    times_ms: dict[str, list[float]] = field(default_factory=dict)

    def median_ms(self, part: str) -> float:
        """Return the median time of a part; that of the GEMMs is what the experts take beside moving rows."""
        if part == "GEMMs":
            return self.median_ms("experts") - self.median_ms("permute") - self.median_ms("combine")
        return float(np.median(self.times_ms[part]))


def build(num_experts: int, top_k: int) -> MoELayer:
    """Return a layer with values: softmax, top-K, load-balance loss and z-loss, nothing dropped."""
    ffn = FFNConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=ACTIVE_WIDTH // top_k,
        router=TopKRouterConfig(),
        balance=BalanceConfig(aux=AuxLossConfig(), z_loss=ZLossConfig()),
    )
    layer = build_moe(ModelConfig(dim=DIM, ffn=ffn), LocalExchange(num_experts), out_std=0.02)
    initialise(layer, seed=0)
    return layer


def prepare(num_experts: int, top_k: int, num_tokens: int) -> Size:
    """Return the parts of one size, each with its inputs ready and cut off from the others' graphs."""
    layer = build(num_experts, top_k)
    x_TD = torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = RoutingContext.of(torch.arange(num_tokens).view(-1, LENGTH))
    with torch.no_grad():
        routing = layer.router(x_TD, context)
    leaves = {name: getattr(routing, name).requires_grad_() for name in ("logits_TE", "probabilities_TE", "weights_TK")}
    routing = dataclasses.replace(routing, **leaves)
    plan = layer.capacity.plan(routing, context, training=True)
    limited = Capacity(FactorCapacityConfig(), num_experts, top_k)
    (arrived,) = layer.exchange.dispatch(x_TD, plan)
    row_map = map_rows(arrived.experts_RK, num_experts, arrived.num_assignments)
    rows_AD = x_TD.detach()[row_map.tokens_N].requires_grad_()
    grad_TD, grad_AD = torch.ones_like(x_TD), torch.ones_like(rows_AD)

    def whole() -> None:
        output = layer(x_TD.view(-1, LENGTH, DIM), context)
        share = layer.balance.share(output.record, output.record.statistics)
        torch.autograd.backward([output.y_BSD, share], [grad_TD.view_as(output.y_BSD), torch.ones_like(share)])

    def record() -> None:
        sums = RoutingRecord.of(routing, plan, context, layer.balance)
        torch.autograd.backward(layer.balance.share(sums, sums.statistics))

    def permute() -> None:
        (moved,) = layer.exchange.dispatch(x_TD, plan)
        rows = gather_rows(x_TD, map_rows(moved.experts_RK, num_experts, moved.num_assignments))
        torch.autograd.backward(rows, grad_AD)

    def router() -> None:
        weights_TK = layer.router(x_TD, context).weights_TK
        torch.autograd.backward(weights_TK, torch.ones_like(weights_TK))

    parts: dict[str, Callable[[], None]] = {
        "layer": whole,
        "router": router,
        "plan": lambda: discard(layer.capacity.plan(routing, context, training=True)),
        "capacity": lambda: discard(limited.plan(routing, context, training=True)),
        "permute": permute,
        "experts": lambda: torch.autograd.backward(layer.experts(arrived), grad_TD),
        "combine": lambda: torch.autograd.backward(sum_rows(rows_AD, row_map), grad_TD),
        "record": record,
    }
    return Size(num_experts, top_k, parts)


def discard(result: object) -> None:
    """Take a result that only had to be computed."""


def measure(sizes: list[Size], repeats: int) -> None:
    """Time every part of every size in turn, ``repeats`` times after the warm-up."""
    for turn in range(-WARM_UP, repeats):
        for size in sizes:
            for name, part in size.parts.items():
                start_s = time.perf_counter()
                part()
                if turn >= 0:
                    size.times_ms.setdefault(name, []).append((time.perf_counter() - start_s) * 1e3)


def line(size: Size) -> str:
    """Return one line of the table."""
    low, layer_ms, high = np.percentile(size.times_ms["layer"], [25, 50, 75])
    shares = [size.median_ms(part) / layer_ms for part in (*OVERHEAD, "GEMMs", "capacity")]
    overhead = sum(shares[: len(OVERHEAD)])
    cells = [f"{size.top_k}", f"{size.num_experts}", f"{layer_ms:.1f} ({low:.1f} to {high:.1f})", f"**{overhead:.1%}**"]
    return f"| {' | '.join(cells + [f'{share:.1%}' for share in shares])} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What routing costs as a share of a MoE layer's time.")
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--choices", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {LENGTH}")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [prepare(e, k, arguments.tokens) for k in arguments.choices for e in arguments.experts if e >= k]
    measure(sizes, arguments.repeats)
    headings = ["K", "E", "layer, ms (quartiles)", "overhead", *OVERHEAD, "GEMMs", "plan with `capacity=factor`"]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    print("\n".join(line(size) for size in sizes))


if __name__ == "__main__":
    main()
