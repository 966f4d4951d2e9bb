"""Measures how much of what the FLOP count promises blocks that only some tokens pass save in a training step.

Usage: python scripts/depth_cost.py [--preset mod_tiny] [--tokens 4096] [--length 1024] [--vocabulary 512] [--repeats 9]
    [--precision fp32] [--device cpu] [--threads 1] [model.KEY=VALUE ...]

Forward and backward, one rank, of the model and of the same model whose blocks take all tokens, in turns, so that a
disturbance of the machine hits both. What is saved is the median over the rounds of 1 - t(some) / t(all); the share of
what was promised is that over 1 - FLOPs(some) / FLOPs(all), the head included in both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from moe_train.config.compose import compose_config
from moe_train.config.depth import FullDepthConfig
from moe_train.config.model import ModelConfig
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange

WARM_UP = 2
"""Rounds that do not count."""
GOAL = 0.6
"""Of the promised saving."""


@dataclass(frozen=True)
class Setting:
    """What both models are measured with.

    Attributes:
        tokens: per step, a multiple of the length.
        length: positions per sequence.
        vocabulary: tokens; small, so that the head does not hide the blocks.
        precision: fp32 or bf16.
        device: where it runs.
        repeats: rounds.
    """

    tokens: int
    length: int
    vocabulary: int
    precision: str
    device: torch.device
    repeats: int


@dataclass(frozen=True)
class Saving:
    """What was measured.

    Attributes:
        all_ms: per round, a step of the model whose blocks take all tokens.
        some_ms: per round, a step of the other.
        promised: share of the FLOPs that it saves.
    """

    all_ms: list[float]
    some_ms: list[float]
    promised: float

    @property
    def shares(self) -> list[float]:
        """Share of the time that was saved, per round."""
        return [1 - some / every for every, some in zip(self.all_ms, self.some_ms, strict=True)]

    @property
    def saved(self) -> float:
        """Median over the rounds."""
        return float(np.median(self.shares))

    @property
    def kept(self) -> float:
        """Share of the promise that was kept."""
        return self.saved / self.promised


def step_of(config: ModelConfig, setting: Setting) -> Callable[[], None]:
    """Return forward and backward on random tokens, the loss of the causal choice included; it waits for the device."""
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, setting.vocabulary, exchange, setting.precision, setting.device)
    initialise(model, 0)
    shape = (2, setting.tokens // setting.length, setting.length)
    generator = torch.Generator().manual_seed(0)
    ids_BS, labels_BS = torch.randint(setting.vocabulary, shape, generator=generator).to(setting.device).unbind()
    layers = model.expert_layers

    def work() -> None:
        output = model(ids_BS)
        loss = F.cross_entropy(output.logits_BSV.flatten(0, 1).float(), labels_BS.flatten())
        for layer, record in zip(layers.values(), output.records, strict=True):
            loss = loss + layer.balance.share(record, record.statistics) / setting.tokens
        torch.autograd.backward(loss)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    return work


def measure(config: ModelConfig, setting: Setting) -> Saving:
    """Time both models in turn."""
    full = config.model_copy(update={"depth": FullDepthConfig()})
    steps = [step_of(one, setting) for one in (full, config)]
    times_ms: tuple[list[float], list[float]] = ([], [])
    for turn in range(-WARM_UP, setting.repeats):
        for step, own_ms in zip(steps, times_ms, strict=True):
            start_s = time.perf_counter()
            step()
            if turn >= 0:
                own_ms.append((time.perf_counter() - start_s) * 1e3)
    flops = [count(one, setting.vocabulary, setting.length).training_flops_per_token for one in (full, config)]
    return Saving(*times_ms, promised=1 - flops[1] / flops[0])


def table(saving: Saving) -> str:
    """Return the Markdown table."""
    low, high = np.percentile(saving.shares, [25, 75])
    cells = [
        f"{np.median(saving.all_ms):.1f}",
        f"{np.median(saving.some_ms):.1f}",
        f"{saving.saved:.1%} ({low:.1%} to {high:.1%})",
        f"{saving.promised:.1%}",
        f"{saving.kept:.0%} (goal: {GOAL:.0%})",
    ]
    headings = ["all tokens, ms", "some tokens, ms", "saved (quartiles)", "promised by FLOPs", "of the promise"]
    return f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|\n| {' | '.join(cells)} |"


def composed(preset: str, overrides: Sequence[str]) -> ModelConfig:
    """Return the model of a preset with changes."""
    model = compose_config("train", TrainConfig, train_problems, [f"model={preset}", *overrides]).model
    if model.depth.kind == "full":
        raise SystemExit(f"{preset}: every token passes every block: there is nothing to compare")
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What blocks that only some tokens pass save.")
    parser.add_argument("--preset", default="mod_tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="per step, a multiple of the length")
    parser.add_argument("--length", type=int, default=1024, help="positions per sequence")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("overrides", nargs="*", help="keys of the configuration")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    setting = Setting(given.tokens, given.length, given.vocabulary, given.precision, device, given.repeats)
    where = f"{given.threads} thread(s)" if given.device == "cpu" else torch.cuda.get_device_name()
    words = " ".join([given.preset, *given.overrides])
    print(f"{words}, {given.precision}, {given.tokens} tokens in sequences of {given.length}, {where}\n")
    print(table(measure(composed(given.preset, given.overrides), setting)))


if __name__ == "__main__":
    main()
