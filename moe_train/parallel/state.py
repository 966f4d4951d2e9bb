"""The state of a training as a checkpoint knows it: parts of tensors, by key, in whatever layout they are held."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.dist.parts import Part
from moe_train.models.transformer import Transformer
from moe_train.moe.roles import Kind, Role, roles_of


def model_parts(model: Transformer) -> dict[str, Part]:
    """Return this rank's part of every parameter and buffer, by ``model.<fqn>``."""
    roles, num_experts = roles_of(model), model.config.ffn.num_experts
    parts = {
        f"model.{name}": part_of(parameter, roles[name], num_experts) for name, parameter in model.named_parameters()
    }
    return parts | {f"model.{name}": Part.whole(buffer) for name, buffer in model.named_buffers()}


def optimizer_parts(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    """Return this rank's part of the optimizer's state, by ``optim.<fqn>.<name of the state>``."""
    roles, num_experts = roles_of(model), model.config.ffn.num_experts
    return {
        f"optim.{name}.{key}": part_of(value, roles[name], num_experts)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def part_of(values: Tensor, role: Role, num_experts: int) -> Part:
    """Return the part that a tensor is, of a parameter with this role or of its optimizer state.

    Args:
        values: what is held here.
        role: of the parameter.
        num_experts: of a feed-forward layer, where the role names no other number.
    """
    if role.kind is Kind.EXPERT and values.dim() > 0:  # the number of steps has no dimension
        return Part.of_experts(values, role.experts, role.num_experts or num_experts)
    return Part.of(values)
