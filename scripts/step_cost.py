"""Measures what the parts of a training step that are not the experts' products cost, by leaving each as it was.

Usage: python scripts/step_cost.py [--models sparse_tiny dense_tiny] [--set model.dim=512 ...] [--length 512]
    [--batch 8] [--precision bf16] [--repeats 9] [--threads 1] [--clock wall|cpu] [--ways eager pointwise block ...]

Forward, loss and backward with a vocabulary of 8192. All ways of a model take turns; ratios are medians over the rounds
of the ratio within a round. With one thread the processor's clock counts no time in which others had the processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.ops.pointwise import fused
from moe_train.parallel.compile import apply_compile

VOCABULARY = 8192
WARM_UP = 2
"""Rounds that do not count; in the first one, what is to be compiled is."""


@dataclass(frozen=True)
class Way:
    """One way to compute a step.

    Attributes:
        keys: that differ from those of the model.
        backend: what marked functions are compiled with; None: nothing.
        is_block: whether parts of blocks are compiled as well.
        loss_chunk: tokens whose logits exist at one time.
    """

    keys: tuple[str, ...] = ()
    backend: str | None = None
    is_block: bool = False
    loss_chunk: int | None = None


WAYS = {
    "eager": Way(),
    "fused attention": Way(("model.attention.compute=fused",)),
    "products": Way(("model.attention.compute=products",)),
    "loss in chunks": Way(loss_chunk=512),
    "pointwise": Way(backend="inductor"),
    "block": Way(backend="inductor", is_block=True),
}


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        keys: of the model, beside its name.
        batch: sequences.
        length: of each.
        precision: fp32 or bf16.
        repeats: rounds that count.
        clock: seconds.
    """

    keys: tuple[str, ...]
    batch: int
    length: int
    precision: str
    repeats: int
    clock: Callable[[], float]


@dataclass(frozen=True)
class Timed:
    """A model with a way to run it.

    Attributes:
        way: of computing.
        model: with first values.
        times_ms: one per round.
    """

    way: Way
    model: Transformer
    times_ms: list[float] = field(default_factory=list)

    def run(self, tokens_BS: torch.Tensor) -> None:
        """Make one pass forwards and backwards; gradients add up in buffers that stay, as in a training."""
        with fused(self.way.backend):
            losses = self.model(tokens_BS[:, :-1], None, [tokens_BS[:, 1:]])
            torch.autograd.backward(losses.loss_sums[0] / tokens_BS.numel())


def timed(name: str, way: Way, setting: Setting) -> Timed:
    """Return a model for one way."""
    keys = [f"model={name}", "model.mtp.depth=0", *setting.keys, *way.keys]
    config = compose_config("train", TrainConfig, lambda config: [], keys).model
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, VOCABULARY, exchange, setting.precision, torch.device("cpu"))
    initialise(model, 0)
    model.loss_chunk = way.loss_chunk
    if way.is_block:
        apply_compile(model)
    return Timed(way, model)


def rows_of(name: str, ways: Sequence[str], setting: Setting) -> list[list[str]]:
    """Return the lines of a table for one preset."""
    models = [timed(name, WAYS[way], setting) for way in ways]
    shape = (setting.batch, setting.length + 1)
    tokens_BS = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    for turn in range(-WARM_UP, setting.repeats):
        for each in models:
            start_s = setting.clock()
            each.run(tokens_BS)
            if turn >= 0:
                each.times_ms.append((setting.clock() - start_s) * 1e3)
    first_ms = np.array(models[0].times_ms)
    rows = []
    for way, each in zip(ways, models, strict=True):
        low, middle, high = np.percentile(each.times_ms, [25, 50, 75])
        ratio = float(np.median(np.array(each.times_ms) / first_ms))
        rows.append([name, way, f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{ratio:.2f}"])
    return rows


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What the parts of a step cost.")
    parser.add_argument("--models", nargs="+", default=["sparse_tiny", "dense_tiny"], help="presets")
    parser.add_argument("--set", nargs="*", default=[], help="keys of the model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    setting = Setting(tuple(given.set), given.batch, given.length, given.precision, given.repeats, clock)
    print(f"{given.precision}, {given.batch} x {given.length} tokens, {given.threads} thread(s), {given.clock} clock\n")
    headings = ["model", "way", "pass, ms (quartiles)", "relative"]
    print("\n".join([f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]), flush=True)
    for name in given.models:
        for row in rows_of(name, given.ways, setting):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
