"""Replays the choices of a trained model on caches of experts: which rule of keeping some finds most of them there.

Usage: python scripts/offload_policy.py RUN [--prompts "..." ...] [--tokens 300] [--sizes 1 2 4 8]

The run continues the prompts token by token, everything in memory; each pass of each layer leaves the experts that it
needed. `clairvoyant` keeps those needed soonest: no rule can do better.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_train.config.schema import LayoutConfig, SampleConfig
from moe_train.dist.world import world_from_environment
from moe_train.inference.load import Trained, load_trained
from moe_train.inference.offload.cache import Buffers, Cache
from moe_train.inference.offload.install import routed_layers
from moe_train.inference.offload.policy import Hotness
from moe_train.inference.sampler import generate
from moe_train.ops.expert_ffn.segments import counts_of

PROMPTS = ["The router ", "| key | meaning |", "What is measured: ", "torchrun --standalone "]
Trace: TypeAlias = list[list[int]]
"""Rows of each expert of a layer, pass by pass."""


class LeastRecent(Hotness):
    """Counts the last pass in which each expert was used, and nothing else."""

    passes = 0

    def count(self, counts: Sequence[int]) -> None:
        """Note the time."""
        self.passes += 1
        self.scores_L = [self.passes if n else s for s, n in zip(self.scores_L, counts, strict=True)]


class Clairvoyant(Hotness):
    """Knows the passes to come.

    Args:
        trace: of the layer.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(len(trace[0]), 0.0)
        self.trace, self.passes = trace, 0

    def count(self, counts: Sequence[int]) -> None:
        """Look how long each expert will not be used."""
        self.passes += 1
        later = range(self.passes, len(self.trace))
        self.scores_L = [
            -float(next((time for time in later if self.trace[time][place]), len(self.trace)))
            for place in range(len(counts))
        ]


def traces_of(trained: Trained, prompt: str, num_tokens: int) -> list[Trace]:
    """Return what each layer's experts got, pass by pass, while a text was continued."""
    traces: list[Trace] = []

    def watch(trace: Trace, num_held: int, module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        trace.append(counts_of(inputs[0].experts_RK, num_held).tolist())

    handles = []
    for _, layer, experts in routed_layers(trained.model):
        traces.append([])
        handles.append(
            experts.register_forward_hook(functools.partial(watch, traces[-1], len(layer.placement.experts)))
        )
    settings, tokenizer = SampleConfig(max_tokens=num_tokens), trained.tokenizer
    generate(trained.model, tokenizer.encode(prompt), settings, -1, trained.config.data.seq_len, True)
    for handle in handles:
        handle.remove()
    return [trace for trace in traces if trace]


def hit_rate(traces: Sequence[Trace], size: int, rule: Callable[[Trace], Hotness]) -> float:
    """Return the share of needed experts that a cache had, each trace from an empty one."""
    hits = needed = 0
    for trace in traces:
        cache = Cache(size, len(trace[0]), lambda place, into: None, Buffers(list), expert_bytes=0)
        cache.hotness = rule(trace)
        for counts in trace:
            for _ in cache.visit(counts):
                pass
        hits += cache.traffic.hits
        needed += cache.traffic.hits + cache.traffic.misses
    return hits / needed


def rules() -> dict[str, Callable[[Trace], Hotness]]:
    """Return the rules by name."""
    decays = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0)
    frequencies = {f"decay {decay}": functools.partial(with_decay, decay=decay) for decay in decays}
    return {
        "least recently used": lambda trace: LeastRecent(len(trace[0]), 0.0),
        **frequencies,
        "clairvoyant": Clairvoyant,
    }


def with_decay(trace: Trace, decay: float) -> Hotness:
    """Return the rule of the package with another decay."""
    return Hotness(len(trace[0]), decay)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Hit rates of caches of experts.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args()
    with world_from_environment(300.0) as world:
        trained = load_trained(given.run, "latest", LayoutConfig(), world)
        traces = [trace for prompt in given.prompts for trace in traces_of(trained, prompt, given.tokens)]
    print(f"{len(traces)} traces, {sum(map(len, traces))} passes, {len(traces[0][0])} experts\n")
    print(
        "\n".join(
            [f"| rule | {' | '.join(f'{size} kept' for size in given.sizes)} |", "|---" * (1 + len(given.sizes)) + "|"]
        )
    )
    for name, rule in rules().items():
        print(f"| {name} | {' | '.join(f'{hit_rate(traces, size, rule):.3f}' for size in given.sizes)} |")


if __name__ == "__main__":
    main()
