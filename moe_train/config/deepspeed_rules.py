"""What DeepSpeed cannot do with experts of ours, each with the reason and the way that works."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem

VERSION = "0.19.8"
"""Of DeepSpeed, whose inner names the engine relies on; pyproject.toml names the same."""
INSTALL = 'pip install "moe_train[deepspeed]"'


def deepspeed_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong with the keys of DeepSpeed, or between them and others.

    Args:
        config: whose fields are valid each for itself.
        world_size: number of ranks; every generator of rules gets it.
    """
    if config.parallel.engine == "torch":
        yield from unused_problems(config)
        return
    yield from installation_problems()
    yield from stage_problems(config)
    yield from precision_problems(config)
    yield from layout_problems(config)


def unused_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield the keys that torch's engine would silently ignore."""
    parallel = config.parallel
    rule = "is a key of DeepSpeed, and parallel.engine is torch"
    if parallel.zero_stage != type(parallel).model_fields["zero_stage"].default:
        remedy = "set parallel.engine=deepspeed, or leave it out and shard with parallel.dp_shard"
        yield Problem("parallel.zero_stage", parallel.zero_stage, rule, remedy)
    if parallel.offload and parallel.dp_shard == 1:
        rule = "parallel.engine is torch, which keeps shards in the host's memory, and parallel.dp_shard=1 makes none"
        yield Problem("parallel.offload", True, rule, "set parallel.dp_shard, or parallel.engine=deepspeed")


def installation_problems() -> Iterator[Problem]:
    """Yield a problem where DeepSpeed is missing or another than the one that was tested."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        yield Problem("parallel.engine", "deepspeed", "DeepSpeed is not installed", INSTALL)
        return
    if installed != VERSION:
        rule = f"relies on the inner workings of DeepSpeed {VERSION}, and {installed} is installed"
        yield Problem("parallel.engine", "deepspeed", rule, INSTALL)


def stage_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what a stage of ZeRO cannot do."""
    stage = config.parallel.zero_stage
    if stage == 3:
        rule = "DeepSpeed shards the weights of experts in layers of its own only"
        remedy = "set parallel.zero_stage=2, or parallel.engine=torch with parallel.dp_shard"
        yield Problem("parallel.zero_stage", stage, rule, remedy)
    if stage == 0 and config.parallel.offload:
        rule = "parallel.zero_stage=0 leaves the optimizer state where the model is"
        yield Problem("parallel.offload", True, rule, "set parallel.zero_stage=1")
    if stage == 0 and config.train.precision == "bf16":
        rule = "in bf16 without ZeRO DeepSpeed makes a step on gradients of zero as it starts, which moves the weights"
        yield Problem("parallel.zero_stage", stage, rule, "set parallel.zero_stage=1")


def precision_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what a number format cannot do."""
    if config.train.precision == "fp64":
        rule = "DeepSpeed updates weights in fp32 at most"
        yield Problem("train.precision", "fp64", rule, "set train.precision=fp32 or parallel.engine=torch")


def layout_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield the keys of the layout that only torch's engine knows."""
    parallel = config.parallel
    if parallel.dp_shard > 1:
        rule = "is FSDP2, which DeepSpeed does not use: ZeRO shards over all ranks that hold the same"
        remedy = "leave it out and set parallel.zero_stage, or set parallel.engine=torch"
        yield Problem("parallel.dp_shard", parallel.dp_shard, rule, remedy)
