"""Rules of `parallel.placement`: when experts that move can even anything out, and by which way they move."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.routing import DeviceCapacityConfig, FactorCapacityConfig, HierarchicalRouterConfig
from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem

KEY, VALUE, LEAVE = "parallel.placement", "auto", "leave it out"


def placement_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong with moving experts."""
    if config.parallel.placement != "auto":
        return
    ffn, ep = config.model.ffn, config.parallel.ep
    if ffn.num_experts == 0 or ffn.graph is not None:
        rule = "evens out how tokens choose experts, and this model's do not choose"
        yield Problem(KEY, VALUE, rule, LEAVE)
    elif ep == 1:
        yield Problem(KEY, VALUE, "every rank holds all experts: parallel.ep=1", f"raise parallel.ep, or {LEAVE}")
    elif ep == ffn.num_experts:
        rule = "every rank holds one expert, and no exchange of two makes the fullest rank's load smaller"
        yield Problem(KEY, VALUE, rule, f"lower parallel.ep, or {LEAVE}")
    elif isinstance(ffn.router, HierarchicalRouterConfig) and ffn.router.groups % ep == 0:
        rule = "every rank holds whole groups of model.ffn.router.groups, which no expert leaves"
        yield Problem(KEY, VALUE, rule, f"raise parallel.ep above the groups, or {LEAVE}")
    yield from capacity_problems(config)
    yield from checkpoint_problems(config)


def capacity_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield why a rule of capacity leaves nothing to even out."""
    capacity = config.model.ffn.capacity
    if isinstance(capacity, FactorCapacityConfig) and capacity.pad:
        rule = "with buffers of fixed size every rank has as much to do, wherever experts are"
        yield Problem(KEY, VALUE, rule, f"set model.ffn.capacity.pad=false, or {LEAVE}")
    if isinstance(capacity, DeviceCapacityConfig):
        rule = "budgets are of devices that hold consecutive experts: model.ffn.capacity.kind=device"
        yield Problem(KEY, VALUE, rule, f"choose another model/ffn/capacity, or {LEAVE}")


def checkpoint_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield why experts have no checkpoint to move by."""
    if config.checkpoint.every == 0:
        rule = "experts move by way of the checkpoints during training, and there are none: checkpoint.every=0"
        yield Problem(KEY, VALUE, rule, f"set checkpoint.every, or {LEAVE}")
    if config.checkpoint.background:
        rule = "experts move by way of a checkpoint of the same step, and those written beside training are older"
        yield Problem(KEY, VALUE, rule, f"set checkpoint.async=false, or {LEAVE}")
