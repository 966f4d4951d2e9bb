"""What may not be combined with an exchange, and what may."""

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.exchange_rules import exchange_problems
from moe_train.config.schema import TrainConfig

PADDED = ("model.ffn.capacity.kind=factor", "model.ffn.capacity.pad=true", "model.ffn.capacity.scope=rank")


def problems_of(world_size: int, *overrides: str) -> list[tuple[str, object]]:
    config = compose_config("train", TrainConfig, lambda config: [], ["model.ffn.num_experts=8", *overrides])
    return [(problem.key, problem.value) for problem in exchange_problems(config, world_size)]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (1, ("parallel.exchange=hierarchical", "parallel.overlap=4")),
        (4, ("parallel.ep=4", "parallel.exchange=hierarchical")),
        (4, ("parallel.ep=4", "parallel.exchange=hierarchical", "parallel.node_size=2")),
        (4, ("parallel.ep=2", "parallel.exchange=hierarchical", "parallel.node_size=4")),
        (4, ("parallel.ep=4", "parallel.exchange=allgather", "parallel.overlap=2")),
        (2, ("parallel.ep=2", "parallel.node_size=8")),
        (6, ("parallel.ep=2", "parallel.node_size=3")),
        (4, ("parallel.ep=4", "parallel.exchange=alltoall", *PADDED)),
        (2, ("parallel.overlap=64", "train.micro_batch=1", "data.seq_len=64")),
    ],
)
def test_what_goes_together(world_size: int, overrides: tuple[str, ...]) -> None:
    assert problems_of(world_size, *overrides) == []


@pytest.mark.parametrize(
    ("world_size", "overrides", "key", "value"),
    [
        (4, ("parallel.node_size=3",), "node_size", 3),
        (6, ("parallel.ep=6", "parallel.exchange=hierarchical", "parallel.node_size=1"), "node_size", 1),
        (12, ("parallel.ep=6", "parallel.exchange=hierarchical", "parallel.node_size=4"), "node_size", 4),
        (4, ("parallel.ep=4", "parallel.exchange=hierarchical", *PADDED), "exchange", "hierarchical"),
        (4, ("parallel.ep=4", "parallel.exchange=allgather", *PADDED), "exchange", "allgather"),
        (4, ("parallel.ep=4", "parallel.exchange=allgather", "model=graph_tiny"), "exchange", "allgather"),
        (4, ("parallel.ep=4", "parallel.overlap=2", *PADDED), "overlap", 2),
        (4, ("parallel.ep=4", "parallel.overlap=2", "model=graph_tiny"), "overlap", 2),
        (2, ("parallel.overlap=65", "train.micro_batch=1", "data.seq_len=64"), "overlap", 65),
        (2, ("parallel.overlap=129", "train.global_batch=4", "data.seq_len=64"), "overlap", 129),
    ],
)
def test_what_does_not(world_size: int, overrides: tuple[str, ...], key: str, value: object) -> None:
    assert problems_of(world_size, *overrides) == [(f"parallel.{key}", value)]


def test_all_problems_are_told_at_once() -> None:
    found = problems_of(4, "parallel.exchange=allgather", "parallel.node_size=3", "parallel.overlap=2", *PADDED)
    assert [key for key, _ in found] == ["parallel.node_size", "parallel.exchange", "parallel.overlap"]
