"""Measures how many ranks a token visits, and what that costs, with groups of experts that are ranks and without.

Usage: torchrun --standalone --nproc-per-node=4 scripts/rank_visits.py [--steps 20] [--set train.global_batch=8 ...]

Trains `hierarchical_tiny`, and the same model with free choice of two of its experts (`topk`), some steps from the same
first weights on the same text, with one EP group of all ranks. A token's own rank counts as visited where one of its
experts is there, but costs nothing. Bytes are those of all layers, forwards and backwards, per token that is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_train.benchmark.rank_visits import Travelled, travelled, watch_ranks
from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.data.corpus import open_corpus
from moe_train.data.loader import TrainLoader
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, world_from_environment
from moe_train.ops.loss import IGNORE
from moe_train.training.schedule import settings_at
from moe_train.training.setup import micro_batch, start_engine
from moe_train.training.step import train_step

VARIANTS = {
    "hierarchical_tiny": (),
    "the same, topk": ("model/ffn/router=topk", "model.ffn.router.scale=2.0"),
}


def measure(keys: Sequence[str], steps: int, world: World) -> Travelled:
    """Train some steps and return what they moved. Collective."""
    fixed = ["model=hierarchical_tiny", f"parallel.ep={world.size}", f"train.steps={steps}", "optim.warmup_steps=0"]
    config = compose_config("train", TrainConfig, train_problems, [*fixed, *keys])
    mesh = build_mesh(world, world.size)
    corpus = open_corpus(config.data, config.tokenizer, world.leader_first)
    engine = start_engine(config, world, mesh, corpus, None)
    batch, rows = config.train.global_batch, micro_batch(config, world)
    loader = TrainLoader(corpus.train, config.data.seq_len, batch, rows, world.rank, world.size, seed=config.run.seed)

    def train() -> None:
        for step in range(steps):
            batches = loader.next_step()
            assert all(bool((each.labels_BS != IGNORE).all()) for each in batches), "training text has no padding"
            settings = settings_at(step, config, corpus.tokenizer.boundary_id)
            train_step(engine, mesh, batches, batch * config.data.seq_len, settings)

    return travelled(train, steps, watch_ranks(engine.model, config, world), config, world)


def main() -> None:
    """Print a Markdown table on the first rank."""
    parser = argparse.ArgumentParser(description="Ranks that a token visits, and bytes that this costs.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], help="keys of the configuration")
    given = parser.parse_args()
    headings = ["model", "ranks per token and layer", "at most", "bytes per token", "closed form"]
    with world_from_environment(120.0) as world:
        lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        for name, keys in VARIANTS.items():
            found = measure([*keys, *given.set], given.steps, world)
            figures = [f"{found.mean_ranks:.3f}", str(found.most_ranks)]
            figures += [f"{value:,.0f}" for value in (found.bytes_per_token, found.closed_bytes_per_token)]
            lines.append(f"| {' | '.join([name, *figures])} |")
        if world.is_leader:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
