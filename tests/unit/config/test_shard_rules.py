"""Over how many ranks weights can be sharded."""

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.config.shard_rules import shard_problems


def config_of(*overrides: str) -> TrainConfig:
    return compose_config("train", TrainConfig, lambda config: [], list(overrides))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (3, ()),
        (4, ("parallel.dp_shard=2",)),
        (4, ("parallel.dp_shard=4", "parallel.ep=2")),
        (8, ("parallel.dp_shard=2", "parallel.ep=8")),
    ],
)
def test_what_is_possible(world_size: int, overrides: tuple[str, ...]) -> None:
    assert list(shard_problems(config_of(*overrides), world_size)) == []


@pytest.mark.parametrize(("world_size", "dp_shard"), [(1, 2), (4, 3), (2, 4)])
def test_shards_divide_the_ranks(world_size: int, dp_shard: int) -> None:
    (problem,) = shard_problems(config_of(f"parallel.dp_shard={dp_shard}"), world_size)
    assert (problem.key, problem.value) == ("parallel.dp_shard", dp_shard)
    assert f"divide the number of ranks, {world_size}" in problem.rule
    assert str(dp_shard) in problem.remedy
