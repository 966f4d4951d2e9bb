"""Builders of workers for the tests of groups of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_train.benchmark.ranks import Abreast, join


def summing(arguments):
    """A variant that needs all ranks, one that waits only on this rank, and a fact."""
    world = join(arguments)

    def total() -> None:
        value = torch.tensor([float(world.rank)])
        dist.all_reduce(value)
        assert value.item() == sum(range(world.size))

    return {"sum": Abreast(world, total), "sum:ranks": float(world.size), "other:ranks": -1.0}


def failing_on_rank_one(arguments):
    """One rank cannot build."""
    if arguments["rank"] == 1:
        raise ValueError("there is no such table")
    return {}
