"""The rule of sharded weights: over how many ranks. Which engine shards by which key is among DeepSpeed's rules."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem


def shard_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between sharding and ranks."""
    dp_shard = config.parallel.dp_shard
    if world_size % dp_shard:
        yield Problem(
            "parallel.dp_shard",
            dp_shard,
            f"must divide the number of ranks, {world_size}",
            f"start a multiple of {dp_shard} ranks (torchrun --nproc-per-node) or lower parallel.dp_shard",
        )
