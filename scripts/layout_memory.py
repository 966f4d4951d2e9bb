"""Says what a rank keeps of a model's state on layouts, and how its tokens would travel: by arithmetic, without ranks.

Usage: python scripts/layout_memory.py MODEL RANKS:EP:DP_SHARD ... [--precision bf16] [--node-size 8]

MODEL is a preset (configs/model); where it states no vocabulary, 50,000 tokens are taken.
"""

from __future__ import annotations

import argparse

from moe_train.config.compose import compose_config
from moe_train.config.schema import LayoutConfig, TrainConfig
from moe_train.dist.mesh import Layout
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange.choose import choose
from moe_train.parallel.memory import memory_per_rank

GIB = 2**30


def layout_of(text: str) -> Layout:
    """Read RANKS:EP:DP_SHARD."""
    ranks, ep, dp_shard = (int(part) for part in text.split(":"))
    return Layout(ranks, ep, dp_shard)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What a rank keeps of a model's state on layouts.")
    parser.add_argument("model")
    parser.add_argument("layouts", nargs="+", type=layout_of, metavar="RANKS:EP:DP_SHARD")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--node-size", type=int, default=8)
    given = parser.parse_args()
    model = compose_config("train", TrainConfig, lambda config: [], [f"model={given.model}"]).model
    ffn = model.ffn
    headings = ["ranks", "ep", "dp_shard", "weights, GiB", "gradients, GiB", "Adam moments, GiB", "gathered, GiB"]
    headings += ["sum, GiB", "auto exchange"]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for layout in given.layouts:
        memory = memory_per_rank(model, model.vocab_size or 50_000, layout, given.precision)
        parts = [memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.gathered_bytes]
        figures = " | ".join(f"{size / GIB:.2f}" for size in [*parts, sum(parts)])
        asked = LayoutConfig(ep=layout.ep)
        choice = choose(layout, ffn.num_experts, ffn.top_k, asked, is_padded(ffn.capacity), given.node_size)
        print(f"| {layout.world_size} | {layout.ep} | {layout.dp_shard} | {figures} | {choice.kind}: {choice.reason} |")


if __name__ == "__main__":
    main()
