"""Rules between the exchange of tokens, the ranks, and what the layers send."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.routing import FactorCapacityConfig
from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem


def exchange_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between `parallel.exchange`, `.node_size`, `.overlap` and everything else.

    Exchange and overlap may stand where no token travels (``parallel.ep=1``) and where an EP group lies within a node:
    a run keeps them when it moves to fewer ranks.
    """
    yield from node_problems(config, world_size)
    yield from kind_problems(config)
    yield from overlap_problems(config, world_size)


def node_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong with the size of a node."""
    ep, size = config.parallel.ep, config.parallel.node_size
    if size is None:
        return
    if world_size > size and world_size % size:
        rule = f"must divide the {world_size} ranks"
        yield Problem("parallel.node_size", size, rule, "set it to the ranks of one machine, or leave it out")
    elif config.parallel.exchange == "hierarchical" and size < ep and (ep % size or size == 1):
        rule = f"hierarchical takes EP groups of whole nodes with several ranks, and parallel.ep={ep}"
        yield Problem("parallel.node_size", size, rule, "change one of them, or set parallel.exchange=alltoall")


def kind_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what is wrong between the exchange and the layers."""
    exchange, ffn = config.parallel.exchange, config.model.ffn
    if exchange in ("hierarchical", "allgather") and ffn.graph is not None:
        rule = "chooses a way to chosen experts, and graph-coupled ones see every token"
        yield Problem("parallel.exchange", exchange, rule, "leave it out")
    elif exchange in ("hierarchical", "allgather") and is_padded(config):
        rule = "capacity.pad sends buffers of fixed size, straight to each rank"
        yield Problem("parallel.exchange", exchange, rule, "set model.ffn.capacity.pad=false, or leave it out")


def overlap_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between the parts and what is cut into them."""
    overlap = config.parallel.overlap
    if overlap == 1:
        return
    sequences = config.train.micro_batch or config.train.global_batch // world_size
    tokens = sequences * config.data.seq_len
    if config.model.ffn.graph is not None:
        rule = "graph-coupled experts see all tokens at once"
        yield Problem("parallel.overlap", overlap, rule, "leave it out; model.ffn.graph.chunk_tokens bounds memory")
    elif is_padded(config):
        rule = "capacity.pad sends buffers of fixed size whole"
        yield Problem("parallel.overlap", overlap, rule, "set model.ffn.capacity.pad=false, or leave it out")
    elif overlap > tokens:
        rule = f"a micro-batch has {tokens} tokens on each rank"
        yield Problem("parallel.overlap", overlap, rule, "lower it: parts below a thousand tokens seldom pay")


def is_padded(config: TrainConfig) -> bool:
    """Return whether layers send buffers of fixed size."""
    capacity = config.model.ffn.capacity
    return isinstance(capacity, FactorCapacityConfig) and capacity.pad
