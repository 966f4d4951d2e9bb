"""Measures what recomputation and compilation cost and save: time and peak memory of a training step of each.

Usage: python scripts/remat_cost.py [--models dense_tiny sparse_tiny deepseek_tiny] [--tokens 2048] [--length 256]
    [--repeats 9] [--precision fp32] [--device cpu] [--threads 1] [--compile]

Forward and backward, one rank. All modes of a model take turns, so that a disturbance of the machine hits all of them;
ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from peak_memory import peak_bytes
from torch.nn import functional as F

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.parallel.compile import apply_compile
from moe_train.parallel.remat import Remat, apply_remat

VOCABULARY = 4096
WARM_UP = 2
"""Rounds that do not count; in the first one, what is to be compiled is."""
MODES: tuple[Remat, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        num_tokens: per step, a multiple of the length.
        length: of a sequence.
        precision: fp32 or bf16.
        device: where it runs.
        repeats: rounds.
    """

    num_tokens: int
    length: int
    precision: str
    device: torch.device
    repeats: int


@dataclass(frozen=True)
class Timed:
    """A way to run a model.

    Attributes:
        remat: what is computed again.
        is_compiled: whether parts of blocks are compiled.
        work: one forward and backward pass; gradients add up in buffers that stay, as in a training.
        times_ms: one per round.
    """

    remat: Remat
    is_compiled: bool
    work: Callable[[], None]
    times_ms: list[float] = field(default_factory=list)

    def over(self, other: Timed) -> float:
        """Return the median over the rounds of this time divided by the other's."""
        return float(np.median(np.array(self.times_ms) / np.array(other.times_ms)))


def timed(config: ModelConfig, remat: Remat, is_compiled: bool, setting: Setting) -> Timed:
    """Return forward, loss and backward of a model on random tokens."""
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, VOCABULARY, exchange, setting.precision, setting.device)
    initialise(model, 0)
    if is_compiled:
        apply_compile(model)
    apply_remat(model, remat)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.num_tokens // setting.length, setting.length)
    ids_BS = torch.randint(VOCABULARY, shape, generator=generator).to(setting.device)

    def work() -> None:
        logits_BSV = model(ids_BS).logits_BSV
        torch.autograd.backward(F.cross_entropy(logits_BSV.flatten(0, 1).float(), ids_BS.flatten()))

    return Timed(remat, is_compiled, work)


def measure(ways: Sequence[Timed], setting: Setting) -> None:
    """Time all in turn."""

    def wait() -> None:
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    for turn in range(-WARM_UP, setting.repeats):
        for way in ways:
            wait()
            start_s = time.perf_counter()
            way.work()
            wait()
            if turn >= 0:
                way.times_ms.append((time.perf_counter() - start_s) * 1e3)


def rows_of(name: str, compiles: Sequence[bool], setting: Setting) -> list[list[str]]:
    """Return the lines of a table for one preset."""
    config = compose_config("train", TrainConfig, lambda config: [], [f"model={name}"]).model
    ways = [timed(config, remat, is_compiled, setting) for is_compiled in compiles for remat in MODES]
    measure(ways, setting)
    first, rows = ways[0], []
    plain_bytes = peak_bytes(first.work, setting.device)
    for way in ways:
        # On a CPU the storages that operators make are counted, which cannot be seen inside of compiled code.
        seen = not way.is_compiled or setting.device.type == "cuda"
        peak = peak_bytes(way.work, setting.device) if seen else None
        low, middle, high = np.percentile(way.times_ms, [25, 50, 75])
        cells = [f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{way.over(first):.2f}"]
        cells += ["-", "-"] if peak is None else [f"{peak / 2**20:.0f}", f"{peak / plain_bytes:.2f}"]
        rows.append([name, way.remat, "block" if way.is_compiled else "none", *cells])
    return rows


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What recomputation and compilation cost and save.")
    parser.add_argument("--models", nargs="+", default=["dense_tiny", "sparse_tiny", "deepseek_tiny"], help="presets")
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of the length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="compiled, too: takes a minute more for each model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given.tokens, given.length, given.precision, torch.device(given.device), given.repeats)
    where = f"{given.threads} thread(s)" if given.device == "cpu" else torch.cuda.get_device_name()
    print(f"{given.precision}, {given.tokens} tokens in sequences of {given.length}, {where}\n")
    headings = ["model", "remat", "compile", "step, ms (quartiles)", "relative", "peak, MiB", "relative"]
    print("\n".join([f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]), flush=True)
    for name in given.models:
        for row in rows_of(name, (False, True) if given.compile else (False,), setting):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
