"""The gradients of a step: what is asked of them, and flat buffers of those that are not sharded.

There is one buffer for what every rank holds and one for this rank's experts. Every `p.grad` is a view into its buffer,
so that a reduction is one collective, the norm is one pass, and a parameter that no token reached has a gradient of
zeros instead of None (a rank that skips a collective hangs all others).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.dist.mesh import Mesh
from moe_train.moe.roles import Kind, roles_of


class Gradients(Protocol):
    """The gradients of a model whose losses are sums over tokens, divided once by the global number of tokens.

    With that rule every reduction is a plain sum. A dense gradient is summed over all ranks. An expert's gradient has
    already collected the tokens of its EP group by way of the exchange; it is summed over its replicas.
    """

    def zero(self) -> None:
        """Start a step."""

    def expect(self, is_last: bool) -> None:
        """Prepare for a backward pass, which may be the last of the step."""

    def reduce(self) -> None:
        """Have the sums over the ranks, once per optimizer step; then no gradient is None."""

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank; call after `reduce`."""

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients with a scalar."""

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter on this rank with an infinite or undefined gradient, or ''."""


class GradientBuffers:
    """Gradients of parameters that every rank has whole.

    Args:
        model: its parameters get their gradients here.
        mesh: the groups to sum over.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        roles = roles_of(model)
        parameters = dict(model.named_parameters())
        experts = [p for name, p in parameters.items() if roles[name].kind is Kind.EXPERT]
        dense = [p for name, p in parameters.items() if roles[name].kind is not Kind.EXPERT]
        self.names = [*(n for n in parameters if roles[n].kind is not Kind.EXPERT)]
        self.names += [n for n in parameters if roles[n].kind is Kind.EXPERT]
        self.parameters = dense + experts
        device = next(model.parameters()).device
        self.dense = flat_buffer(dense, device)
        self.experts = flat_buffer(experts, device)

    def zero(self) -> None:
        """Start a step."""
        for buffer in (self.dense, self.experts):
            buffer.zero_()

    def expect(self, is_last: bool) -> None:
        """Do nothing: what is added up here is reduced once, after the last backward pass."""

    def reduce(self) -> None:
        """Sum over the ranks, once per optimizer step, in a fixed order on every rank."""
        for parameter, name in zip(self.parameters, self.names, strict=True):
            assert parameter.grad is not None, f"the gradient of {name} has left its buffer"
        dist.all_reduce(self.dense, group=self.mesh.world)
        if self.experts.numel():
            dist.all_reduce(self.experts, group=self.mesh.edp)

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank; call after `reduce`.

        Each expert counts once: squares are added over the EP group, never over the replicas.
        """
        squared_dense, squared_experts = squared_norm(self.dense), squared_norm(self.experts)
        dist.all_reduce(squared_experts, group=self.mesh.ep)
        return (squared_dense + squared_experts).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients with a scalar."""
        for buffer in (self.dense, self.experts):
            buffer.mul_(factor.to(buffer.dtype))

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter on this rank with an infinite or undefined gradient, or ''."""
        for parameter, name in zip(self.parameters, self.names, strict=True):
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return name
        return ""


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares, fp64 scalar; 0 for an empty tensor."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def flat_buffer(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """Return one buffer of zeros [number of values] and make it hold the parameters' gradients."""
    dtypes = {p.dtype for p in parameters}
    assert len(dtypes) <= 1, f"parameters of several dtypes {dtypes} cannot share a buffer"
    dtype = dtypes.pop() if dtypes else torch.float32
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=device)
    start = 0
    for parameter in parameters:
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return buffer
