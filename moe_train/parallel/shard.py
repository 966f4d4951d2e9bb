"""Weights, gradients and optimizer state sharded over ranks, by torch's FSDP2.

A block's weights are gathered before its forward pass, dropped after it, gathered again for its backward pass, and its
gradients are summed and cut as soon as they are there. Dense weights lie on a mesh of all ranks, those of experts on
one of the ranks that hold the same: for the model they stay the plain tensors [L, ...] of this rank's experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from moe_train.dist.mesh import Mesh
from moe_train.models.blocks import CoupledBlocks, TransformerBlock
from moe_train.models.transformer import Transformer
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer
from moe_train.moe.record import ExpertLayer
from moe_train.moe.roles import Kind, roles_of
from moe_train.parallel.gradients import squared_norm


def shard(model: Transformer, mesh: Mesh, gather_dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Shard a model in place: from now on its parameters are DTensors, plain only while they are used.

    Args:
        model: whole as far as this rank is concerned; may be on the meta device, to be given memory and values after.
        mesh: its groups, sharding among them.
        gather_dtype: in which routed experts' weights travel and are used; None: as they are kept. Gradients are summed
            as the weights are kept.
        offload: whether weights and gradients are kept in the host's memory, and so by an optimizer its state: each
            unit's come to the device when it is used.
    """
    sharding = mesh.sharding
    assert sharding is not None, "this mesh shards nothing"
    place = place_of(offload)
    # No caller changes in place what a module returned.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for block in model.all_blocks:
        shard_block(block, sharding.dense, sharding.experts, gather_dtype, place)
    for layer in model.outer_layers.values():
        shard_layer(layer, sharding.dense, sharding.experts, gather_dtype, place)
    for module in model.mtp:
        fully_shard(module, mesh=sharding.dense, offload_policy=place)
    # What the model holds itself is wanted at both ends of a pass: it stays from the forward pass to the backward pass.
    fully_shard(model, mesh=sharding.dense, reshard_after_forward=False, offload_policy=place)
    for unit in units_of(model):
        # Plain sums: the first alone averages, the second alone fails on gloo for all dtypes but fp64.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def place_of(offload: bool) -> OffloadPolicy:
    """Return where shards are kept: with their device, or in the host's memory, pinned where there is a device."""
    return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if offload else OffloadPolicy()


def device_of(model: Transformer, mesh: Mesh) -> torch.device:
    """Return where a model computes; shards of its weights may be kept in the host's memory."""
    if mesh.sharding is None:
        return model.embedding_VD.device
    return torch.device(mesh.sharding.dense.device_type)  # without an index: the one that this process chose


def give_memory(model: Transformer, device: torch.device, offload: bool) -> None:
    """Give a sharded model on the meta device memory without values: buffers are always with the device."""
    model.to_empty(device=torch.device("cpu") if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def shard_block(
    block: TransformerBlock,
    dense: DeviceMesh,
    experts: DeviceMesh,
    gather_dtype: torch.dtype | None,
    place: OffloadPolicy,
) -> None:
    """Shard the experts of a block, then what is around them."""
    for layer in block.expert_layers.values():
        shard_layer(layer, dense, experts, gather_dtype, place)
    if not isinstance(block, CoupledBlocks):  # which has nothing but its layer
        fully_shard(block, mesh=dense, offload_policy=place)


def shard_layer(
    layer: ExpertLayer,
    dense: DeviceMesh,
    experts: DeviceMesh,
    gather_dtype: torch.dtype | None,
    place: OffloadPolicy,
) -> None:
    """Shard the experts of a layer; of one that a graph couples also what couples them."""
    if isinstance(layer, MoELayer):
        # Each pass uses these once, cast: gathering them cast changes no value, and halves what travels.
        policy = MixedPrecisionPolicy(gather_dtype, reduce_dtype_of(layer.experts), cast_forward_inputs=False)
        fully_shard(
            layer.experts,
            mesh=experts,
            mp_policy=policy if gather_dtype else MixedPrecisionPolicy(),
            shard_placement_fn=placement_over(experts.size(1)),
            offload_policy=place,
        )
    elif isinstance(layer, GraphLayer):
        placement = placement_over(experts.size(1))
        fully_shard(layer.experts, mesh=experts, shard_placement_fn=placement, offload_policy=place)
        fully_shard(layer, mesh=dense, offload_policy=place)
        register_fsdp_forward_method(layer, "figures")  # which reads weights between the passes


def reduce_dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a module's weights are kept."""
    return next(module.parameters()).dtype


def placement_over(size: int) -> Callable[[nn.Parameter], Shard]:
    """Return along which dimension an expert's parameter is sharded over ``size`` ranks.

    That is the first within an expert that divides evenly, as torch demands; else the one over experts, which need not.
    """

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(next((dim for dim in range(1, parameter.dim()) if parameter.shape[dim] % size == 0), 0))

    return placement


def units_of(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules whose weights are gathered together."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def keep_shards_only(model: nn.Module) -> None:
    """Drop what an evaluation left gathered: the parameters of a sharded model are then those of the optimizer."""
    for unit in units_of(model):
        unit.reshard()


class ShardedGradients:
    """Gradients of sharded parameters: each rank has, of each, the part that it has of the parameter.

    Each backward pass sums them over the ranks that share a set of weights, so that no rank ever keeps the gradients of
    a whole model, not even under accumulation; the replicas are added once, in the last pass.

    Args:
        model: sharded.
        mesh: the groups.
    """

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        assert mesh.sharding is not None, "this mesh shards nothing"
        self.model = model
        self.mesh, self.sharding = mesh, mesh.sharding
        roles = roles_of(model)
        self.parameters = dict(model.named_parameters())
        self.experts = {name for name in self.parameters if roles[name].kind is Kind.EXPERT}

    def zero(self) -> None:
        """Start a step: the memory of the gradients is free until the first backward pass."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def expect(self, is_last: bool) -> None:
        """Prepare for a backward pass, which may be the last of the step."""
        for unit in units_of(self.model):
            unit.set_requires_all_reduce(is_last, recurse=False)

    def reduce(self) -> None:
        """Give zeros to what no loss reached; the sums are there."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank; call after `reduce`.

        Each value counts once: squares are added over the ranks that share a set of weights, never over the replicas.
        """
        dense = self.squares([name for name in self.parameters if name not in self.experts])
        experts = self.squares([name for name in self.parameters if name in self.experts])
        dist.all_reduce(dense, group=self.sharding.dense.get_group("shard"))
        dist.all_reduce(experts, group=self.sharding.experts.get_group("shard"))
        dist.all_reduce(experts, group=self.mesh.ep)
        return (dense + experts).sqrt()

    def squares(self, names: Sequence[str]) -> Tensor:
        """Return the sum of the squares here of some gradients, fp64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.model.embedding_VD.device)
        for name in names:
            total += squared_norm(self.local(name))
        return total

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients with a scalar."""
        for name in self.parameters:
            gradient = self.local(name)
            gradient.mul_(factor.to(gradient.dtype))

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter on this rank with an infinite or undefined gradient, or ''."""
        return next((name for name in self.parameters if not bool(self.local(name).isfinite().all())), "")

    def local(self, name: str) -> Tensor:
        """Return this rank's part of a gradient: its memory."""
        gradient = self.parameters[name].grad
        assert isinstance(gradient, DTensor), f"the gradient of {name} is not sharded"
        return gradient.to_local()
