"""Measures what it costs to bring tokens to experts: every exchange, whole and in parts, balanced and skewed.

Usage: python scripts/exchange_cost.py [--ranks 2 4] [--kinds alltoall allgather hierarchical] [--parts 1 2 4]
    [--tokens 2048] [--dim 256] [--hidden 512] [--experts 16] [--top-k 4] [--shared] [--latency-ms 0] [--repeats 9]

Forward and backward of one Mixture-of-Experts layer over gloo ranks that the script starts, one thread each, with nodes
of half the ranks. Whatever stands in one table takes turns; ratios are medians over the rounds of the ratio within a
round, and a round lasts until the last rank is done. ``--latency-ms`` stands for a slow network: whatever is started
arrives that much later, in which time other work may be done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from graph_cost import table
from torch._C._distributed_c10d import FileStore

from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.schema import LayoutConfig
from moe_train.dist import underway
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.meter import METER
from moe_train.dist.world import World, joined
from moe_train.models.build import build_moe
from moe_train.models.initialise import initialise
from moe_train.moe.exchange import exchange_for
from moe_train.moe.layer import MoELayer

WARM_UP = 2
"""Rounds that do not count."""
LENGTH = 128
SKEW = 3.0
"""Added to the logits of the experts of the first rank, in standard deviations of the others."""


class Slow:
    """A collective that arrives some time after it was started, however early it is waited for."""

    def __init__(self, work: dist.Work, latency_s: float) -> None:
        self.work, self.due_s = work, time.perf_counter() + latency_s

    def wait(self) -> None:
        """Wait for the collective and for its time."""
        self.work.wait()
        time.sleep(max(0.0, self.due_s - time.perf_counter()))

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return time.perf_counter() >= self.due_s and self.work.is_completed()


@dataclass
class Row:
    """One line of the table.

    Attributes:
        work: one forward and backward.
        times_ms: one per round.
        inside_bytes: of one round, of this rank.
        between_bytes: the same to other nodes.
    """

    work: Callable[[], None]
    times_ms: list[float] = field(default_factory=list)
    inside_bytes: int = 0
    between_bytes: int = 0


def layer_of(given: argparse.Namespace, mesh: Mesh, kind: str, parts: int) -> MoELayer:
    """Return a layer of the size asked for."""
    ffn = FFNConfig(
        num_experts=given.experts, top_k=given.top_k, expert_dim=given.hidden, num_shared_experts=int(given.shared)
    )
    config = LayoutConfig.model_validate(
        {"ep": mesh.layout.ep, "exchange": kind, "overlap": parts, "node_size": max(1, mesh.layout.ep // 2)}
    )
    exchange = exchange_for(mesh, given.experts, False, config, given.top_k)
    layer = build_moe(ModelConfig(dim=given.dim, ffn=ffn), exchange, out_std=0.02)
    initialise(layer, 0)
    return layer


def step_of(given: argparse.Namespace, mesh: Mesh, layer: MoELayer, is_skewed: bool) -> Callable[[], None]:
    """Return forward and backward on tokens of this rank."""
    generator = torch.Generator().manual_seed(mesh.rank)
    x_BSD = torch.randn(given.tokens // LENGTH, LENGTH, given.dim, generator=generator)
    weight_ED = torch.randn(given.experts, given.dim, generator=torch.Generator().manual_seed(1))
    if is_skewed:  # the first feature draws every token to the experts of the first rank
        x_BSD[..., 0] = 1.0
        weight_ED[: given.experts // mesh.layout.ep, 0] += SKEW * given.dim**0.5
    dict(layer.named_parameters())["router.weight"].data.copy_(weight_ED / given.dim**0.5)
    x_BSD.requires_grad_()
    grad_BSD = torch.ones_like(x_BSD)
    return lambda: torch.autograd.backward(layer(x_BSD).y_BSD, grad_BSD)


def measure(rows: list[Row], repeats: int) -> None:
    """Time everything in turn; a round ends with the slowest rank."""
    for turn in range(-WARM_UP, repeats):
        for row in rows:
            dist.barrier()
            METER.take_ms()
            start_s = time.perf_counter()
            row.work()
            dist.barrier()
            if turn >= 0:
                row.times_ms.append((time.perf_counter() - start_s) * 1e3)
            row.inside_bytes, row.between_bytes = METER.inside_bytes, METER.between_bytes


def sum_of_ranks(number: int) -> int:
    """Return the sum over the ranks."""
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def with_latency(latency_s: float) -> None:
    """Delay all that is started from here on."""
    true = underway.Flight

    def delayed(work: Any, tensors: Any) -> underway.Flight:
        return true(Slow(work, latency_s), tensors)  # type: ignore[arg-type]

    underway.Flight = delayed  # type: ignore[misc, assignment]


def tables_of(given: argparse.Namespace, world: World) -> str:
    """Return the tables of one number of ranks."""
    mesh = build_mesh(world, world.size)
    texts = []
    for is_skewed in (False, True):
        rows = {}
        for kind in given.kinds:
            if kind == "hierarchical" and world.size < 4:
                continue
            for parts in given.parts:
                layer = layer_of(given, mesh, kind, parts)
                rows[kind, parts] = Row(step_of(given, mesh, layer, is_skewed))
        measure(list(rows.values()), given.repeats)
        first = next(iter(rows.values()))
        lines = []
        for (kind, parts), row in rows.items():
            low, middle, high = np.percentile(row.times_ms, [25, 50, 75])
            ratio = float(np.median(np.array(row.times_ms) / np.array(first.times_ms)))
            sent = [sum_of_ranks(n) / 2**20 for n in (row.inside_bytes, row.between_bytes)]
            cells = [kind, str(parts), f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{ratio:.2f}"]
            lines.append([*cells, *(f"{mib:.1f}" for mib in sent)])
        routing = "skewed" if is_skewed else "balanced"
        headings = [f"{world.size} ranks, {routing}", "parts", "ms (quartiles)", "relative", "MiB inside nodes"]
        texts.append(table([*headings, "MiB between"], lines))
    return "\n\n".join(texts)


def rank_main(rank: int, size: int, folder: str, given: argparse.Namespace) -> None:
    """Be one rank; the first prints."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", size)
    with joined(store, World(rank, size, torch.device("cpu"), 120.0)) as world:
        if given.latency_ms:
            with_latency(given.latency_ms / 1e3)
        text = tables_of(given, world)
        if rank == 0:
            print(text, end="\n\n", flush=True)


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description="What it costs to bring tokens to experts.")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    kinds = ["alltoall", "allgather", "hierarchical"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="the first is the reference")
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 2, 4], help="parallel.overlap")
    parser.add_argument("--tokens", type=int, default=2048, help=f"per rank, a multiple of {LENGTH}")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="of one expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shared", action="store_true", help="with a shared expert")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of every collective that is started")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    shared = ", a shared expert" if given.shared else ""
    print(
        f"{given.tokens} tokens per rank, D={given.dim}, E={given.experts}, K={given.top_k}, F={given.hidden}{shared}"
    )
    print(f"latency {given.latency_ms:g} ms\n", flush=True)
    for size in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (size, folder, given), nprocs=size)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
