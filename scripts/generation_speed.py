"""Measures what remembering a text gains: tokens per second of generation with and without keys and values kept.

Usage: python scripts/generation_speed.py [--models dense_tiny sparse_tiny deepseek_v3_tiny] [--lengths 256 1024]
    [--prompt 16] [--rounds 5] [--precision fp32] [--device cpu] [--threads 1]

One text, random weights, greedy; the vocabulary is small, so that the head does not hide the blocks. Both ways take
turns, so that a disturbance of the machine hits both; the gain is the median over the rounds of the gain within a
round. The last column says whether both wrote the same text, as they must but for rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_train.benchmark.timing import Here, Times, interleave
from moe_train.config.compose import compose_config
from moe_train.config.schema import SampleConfig, TrainConfig
from moe_train.inference.sampler import can_remember, generate
from moe_train.models.initialise import initialise
from moe_train.models.memory import TextMemory
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

VOCABULARY, WARM_UP = 1024, 1
READ_AGAIN, REMEMBERED = "read again", "remembered"


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        prompt: tokens of the prompt.
        precision: fp32 or bf16.
        device: where it runs.
        rounds: how often each way is timed.
    """

    prompt: int
    precision: str
    device: torch.device
    rounds: int


def model_of(name: str, setting: Setting) -> Transformer:
    """Return a preset with random weights, all experts here."""
    config = compose_config("train", TrainConfig, lambda config: [], [f"model={name}"]).model
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, VOCABULARY, exchange, setting.precision, setting.device)
    initialise(model, seed=0)
    return model.eval()


def text_of(model: Transformer, length: int, setting: Setting, remember: bool) -> list[int]:
    """Continue a prompt up to so many tokens, all of them within the context. No token ends the text."""
    sample = SampleConfig(max_tokens=length - setting.prompt, temperature=0.0)
    return generate(model, list(range(setting.prompt)), sample, VOCABULARY, length, remember)


@torch.no_grad()
def bytes_per_token(model: Transformer) -> int:
    """Return what the memory of a text grows by with each token, without the room for later ones, in bytes."""
    memory, num = TextMemory(len(model.blocks)), 32
    model(torch.zeros(1, num, dtype=torch.int64, device=model.embedding_VD.device), memory=memory)
    return memory.num_bytes // (2 * num)


def measured(model: Transformer, length: int, setting: Setting) -> tuple[dict[str, Times], bool]:
    """Time both ways in turn, each time the whole text; return also whether the texts are the same."""
    texts: dict[str, list[int]] = {}

    def variant(way: str) -> Here:
        def work() -> None:
            texts[way] = text_of(model, length, setting, way == REMEMBERED)

        return Here(work, setting.device)

    times = interleave({way: variant(way) for way in (READ_AGAIN, REMEMBERED)}, setting.rounds, WARM_UP)
    return times, texts[READ_AGAIN] == texts[REMEMBERED]


def rows(names: list[str], lengths: list[int], setting: Setting) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| model | tokens | way | tokens/s | gain | bytes/token | same text |\n|---|---|---|---|---|---|---|"
    for name in names:
        model = model_of(name, setting)
        for length in lengths:
            times, is_same = measured(model, length, setting)
            for way, found in times.items():
                rate = (length - setting.prompt) / found.median_ms * 1e3
                kept = bytes_per_token(model) if way == REMEMBERED and can_remember(model.config) else 0
                gain = found.ratio_to(times[READ_AGAIN])
                yield f"| {name} | {length} | {way} | {rate:.1f} | {gain} | {kept} | {'yes' if is_same else 'no'} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What remembering a text gains.")
    parser.add_argument("--models", nargs="+", default=["dense_tiny", "sparse_tiny", "deepseek_v3_tiny"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given.prompt, given.precision, torch.device(given.device), given.rounds)
    for line in rows(given.models, given.lengths, setting):
        print(line, flush=True)


if __name__ == "__main__":
    main()
