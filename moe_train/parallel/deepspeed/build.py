"""From a configuration to DeepSpeed's engine."""

from __future__ import annotations

import torch

from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer
from moe_train.moe.roles import Kind, roles_of
from moe_train.parallel.deepspeed.engine import DeepSpeedEngine
from moe_train.parallel.deepspeed.settings import settings_of
from moe_train.parallel.deepspeed.state import ShardedState, WholeState


def build_deepspeed(
    config: TrainConfig, mesh: Mesh, world: World, model: Transformer, optimizer: torch.optim.Optimizer
) -> DeepSpeedEngine:
    """Return DeepSpeed's engine. Collective.

    Args:
        config: validated, with ``parallel.engine=deepspeed``.
        mesh: the groups.
        world: the processes.
        model: with the values that training begins with, those of ``model.init_from`` included: DeepSpeed copies them,
            and what is written into the model later is lost at the first step. Only a checkpoint may come later.
        optimizer: over the model's parameters, one kind of parameter per group; DeepSpeed takes its parameters over.
    """
    from moe_train.parallel.deepspeed import runtime  # deepspeed is an optional dependency, and slow to import

    mark_experts(model, optimizer, runtime.group_name(mesh))
    wrapped = runtime.start(model, optimizer, settings_of(config, world.size), mesh, world)
    is_sharded = config.parallel.zero_stage > 0
    state = ShardedState(model, wrapped.optimizer, mesh) if is_sharded else WholeState(model, optimizer, mesh)
    return DeepSpeedEngine(model, wrapped, state, config.train.clip_norm)


def mark_experts(model: Transformer, optimizer: torch.optim.Optimizer, group_name: str) -> None:
    """Tell DeepSpeed which parameters, and which groups of the optimizer, are experts'.

    A group's name is the key of the process group that its gradients are summed over; decay and ``lr_ratio`` stay.
    """
    roles = roles_of(model)
    experts = {id(p): p for name, p in model.named_parameters() if roles[name].kind is Kind.EXPERT}
    for parameter in experts.values():
        parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        kinds = {id(parameter) in experts for parameter in group["params"]}
        assert len(kinds) == 1, "a group holds experts' parameters or others, not both"
        if kinds == {True}:
            group.update(moe=True, name=group_name)
