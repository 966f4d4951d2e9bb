"""Experts that are whole transformer blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_train.models.blocks import Block
from moe_train.moe.context import RoutingContext
from moe_train.moe.roles import Kind, Role, roles_of
from moe_train.ops.rotary import Rotary


class BlockExperts(nn.Module):
    """Transformer blocks of one shape, each with weights of its own and each applied to every sequence.

    The module is one block whose every parameter has a dimension more, over the experts held here: so an expert's
    attention may be of any kind, and its weights are initialised, reduced and saved as those of all experts are.

    Args:
        block: a block without values, to be stacked.
        experts: global indices of the experts held here, in order of places.
    """

    def __init__(self, block: Block, experts: Sequence[int]) -> None:
        super().__init__()
        self.num_held = len(experts)
        self.block = block
        stack_parameters(block, experts)

    def forward(self, x_RSD: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Return what each block makes of the sequences [R, S, D]: [R, S, L, D], the residual stream included."""
        context = RoutingContext.of(torch.zeros(x_RSD.shape[:2], dtype=torch.int64, device=x_RSD.device))
        # One split per parameter: its backward is one stack, where a selection per expert would add up L full tensors.
        pieces = {name: stacked.unbind() for name, stacked in self.block.named_parameters()}
        made = []
        for place in range(self.num_held):
            own = {name: parts[place] for name, parts in pieces.items()}
            made.append(functional_call(self.block, own, (x_RSD, rotary, context)).x_BSD)
        return torch.stack(made, dim=2)


def stack_parameters(block: nn.Module, experts: Sequence[int]) -> None:
    """Give every parameter of a module a first dimension over experts, and the role of an expert's."""
    roles = roles_of(block)
    for prefix, module in list(block.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            stacked = parameter.new_empty(len(experts), *parameter.shape)
            setattr(module, name, nn.Parameter(stacked))
        if own:
            module.roles = {name: as_expert(roles[f"{prefix}.{name}" if prefix else name], experts) for name in own}


def as_expert(role: Role, experts: Sequence[int]) -> Role:
    """Return the role of a parameter that every expert has."""
    return Role(Kind.EXPERT, role.std, experts, role.truncated, role.mean, role.decays)
