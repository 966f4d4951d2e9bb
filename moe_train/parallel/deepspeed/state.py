"""Gradients and state of a model under ZeRO: what each rank holds is a part, and nothing has to be gathered.

ZeRO lays the parameters of a group of the optimizer one after the other, and gives each rank that holds them an equal
run of the values: fp32 masters and moments. A run of a tensor's values is a few boxes of it (`partition`), views of
that memory. So a checkpoint costs no copy, and one of any engine, stage and layout loads into any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.dist.mesh import Mesh
from moe_train.dist.parts import Part, by_expert
from moe_train.models.transformer import Transformer
from moe_train.moe.roles import Kind, Role, roles_of
from moe_train.parallel.deepspeed.partition import boxes_of_run
from moe_train.parallel.engine import materialise
from moe_train.parallel.gradients import squared_norm
from moe_train.parallel.state import model_parts, optimizer_parts

STEP = "step"


@dataclass(frozen=True)
class Held:
    """What a rank holds of one parameter under ZeRO.

    Attributes:
        name: of the parameter.
        shape: of the parameter on this rank; of an expert's, that of the experts held here.
        group: index of its group in the optimizer.
        place: of the first value held here, in the rank's run of the group.
        start: of the same value, in the parameter.
        length: number of values; 0 where they lie on other ranks.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    place: int
    start: int
    length: int


class ShardedState:
    """Stages 1 and 2.

    Args:
        model: as DeepSpeed has left it: its parameters are views of DeepSpeed's flat ones.
        zero: DeepSpeed's ``DeepSpeedZeroOptimizer``.
        mesh: the groups.
    """

    def __init__(self, model: Transformer, zero: Any, mesh: Mesh) -> None:
        self.model, self.zero, self.mesh = model, zero, mesh
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.held = [held for group in range(len(zero.bit16_groups)) for held in held_of_group(zero, group, names)]
        materialise(zero.optimizer)

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank.

        Every value is held by one rank: a dense one by one of all, an expert's by one of those that hold the expert.
        """
        squared = torch.zeros((), dtype=torch.float64, device=self.model.embedding_VD.device)
        for gradient in self.gradients():
            squared += squared_norm(gradient).to(squared.device)
        dist.all_reduce(squared, group=self.mesh.world)
        return squared.sqrt()

    def gradients(self) -> Iterator[Tensor]:
        """Yield the summed gradients held here, after the last micro-batch of a step."""
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()
            yield from (run.grad for run in self.zero.single_partition_of_fp32_groups)
        else:
            for group in range(len(self.zero.bit16_groups)):
                yield from self.zero.averaged_gradients[group]

    def scale(self, factor: Tensor) -> None:
        """Do nothing: DeepSpeed clips as it steps."""

    def discard(self) -> None:
        """Forget the gradients of a step that is not made, by the way in which DeepSpeed skips one. Collective."""
        self.zero.check_grad_overflow = True
        self.zero.step()
        self.zero.check_grad_overflow = False
        assert self.zero.overflow, "a bad gradient was found, and DeepSpeed has not seen it"

    def parts(self) -> dict[str, Part]:
        """Return this rank's part of weights (fp32, also where the model is bf16), buffers and optimizer state."""
        roles, num_experts = roles_of(self.model), self.model.config.ffn.num_experts
        parts = {f"model.{name}": Part.whole(buffer) for name, buffer in self.model.named_buffers()}
        for held in self.held:
            role, run = roles[held.name], self.zero.single_partition_of_fp32_groups[held.group]
            parts[f"model.{held.name}"] = part_of_run(run.data, held, role, num_experts)
            for key, values in self.zero.optimizer.state[run].items():
                shared = key == STEP  # one number for the whole run
                part = Part.whole(values) if shared else part_of_run(values, held, role, num_experts)
                parts[f"optim.{held.name}.{key}"] = part
        return parts

    def adopt(self) -> None:
        """Make the model's weights those of the masters, which were filled. Collective."""
        self.zero.update_lp_params()


class WholeState:
    """Stage 0: parameters, gradients and state are the model's own; every rank has them whole.

    Args:
        model: of which each rank holds everything but other ranks' experts.
        optimizer: torch's.
        mesh: the groups.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        roles = roles_of(model)
        self.experts = [p for name, p in model.named_parameters() if roles[name].kind is Kind.EXPERT]
        self.dense = [p for name, p in model.named_parameters() if roles[name].kind is not Kind.EXPERT]
        materialise(optimizer)

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank."""
        squared_dense, squared_experts = self.squared(self.dense), self.squared(self.experts)
        dist.all_reduce(squared_experts, group=self.mesh.ep)
        return (squared_dense + squared_experts).sqrt()

    def squared(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return the sum of the squares of their gradients, fp64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.model.embedding_VD.device)
        for parameter in parameters:
            assert parameter.grad is not None, "DeepSpeed gives every parameter a gradient as it reduces"
            total += squared_norm(parameter.grad)
        return total

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients with a scalar."""
        for parameter in self.dense + self.experts:
            assert parameter.grad is not None, "the norm was taken of it"
            parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def discard(self) -> None:
        """Forget the gradients of a step that is not made."""
        for parameter in self.dense + self.experts:
            parameter.grad = None

    def parts(self) -> dict[str, Part]:
        """Return weights, buffers and optimizer state."""
        return model_parts(self.model) | optimizer_parts(self.model, self.optimizer)

    def adopt(self) -> None:
        """Do nothing: the parts are the state itself."""


def held_of_group(zero: Any, group: int, names: dict[int, str]) -> Iterator[Held]:
    """Yield what this rank holds of each parameter of a group."""
    first = dist.get_rank(zero.real_dp_process_group[group]) * zero.partition_size[group]
    last = first + zero.partition_size[group]
    offsets = zero.round_robin_bit16_offsets[group]
    for parameter, offset in zip(zero.round_robin_bit16_groups[group], offsets, strict=True):
        begin, end = max(first, offset), min(last, offset + parameter.numel())
        shape = tuple(parameter.shape)
        yield Held(names[id(parameter)], shape, group, begin - first, begin - offset, max(0, end - begin))


def part_of_run(run: Tensor, held: Held, role: Role, num_experts: int) -> Part:
    """Return the part of a parameter, or of a moment of it, that lies in this rank's run of a group."""
    boxes = boxes_of_run(run[held.place : held.place + held.length], held.start, held.shape) if held.length else ()
    if role.kind is not Kind.EXPERT:
        return Part(held.shape, tuple(boxes))
    num_experts = role.num_experts or num_experts
    return Part((num_experts, *held.shape[1:]), tuple(moved for box in boxes for moved in by_expert(box, role.experts)))
