"""The gradients of a step: what is asked of them, and those of parameters that are not sharded.

What several ranks hold has one flat buffer, so that its reduction is one collective; what this rank alone holds (all of
it in a run of one process, the experts where each is held once) keeps the gradients that a backward pass leaves. A
parameter that no token reached has a gradient of zeros instead of None (a rank that skips a collective hangs all
others).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.dist.mesh import Mesh
from moe_train.moe.roles import Kind, roles_of

ROW = 4096
"""Squares that are added up in fp32 before their sum counts in fp64."""


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


class OwnGradients:
    """Of parameters that no other rank holds: as autograd leaves them.

    No memory is set to zero, and nothing is added to it: the first backward pass of a step gives its own.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def zero(self) -> None:
        """Start a step."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def reduce(self) -> None:
        """Give zeros to what no loss reached."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def gradients(self) -> Sequence[Tensor]:
        """Return them."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]


class SummedGradients:
    """Of parameters that other ranks hold too: in one buffer, summed by one collective.

    A gradient moves into its place in the buffer as soon as a backward pass has it: the first of a step overwrites what
    is there, so that the buffer need not be set to zero and read again. Then, and after `reduce`, `p.grad` is a view.

    Args:
        parameters: by name.
        group: the ranks that hold them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.buffer = flat_buffer(list(parameters.values()))
        self.views = {parameter: parameter.grad for parameter in parameters.values()}
        for parameter in self.views:
            parameter.register_post_accumulate_grad_hook(self.move)  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Start a step."""
        for parameter in self.views:
            parameter.grad = None

    def move(self, parameter: Tensor) -> None:
        """Bring a gradient of a backward pass to its place; later passes of the step add to it there."""
        view, gradient = self.views[parameter], parameter.grad  # type: ignore[index]
        assert view is not None and gradient is not None, "called with a new gradient"
        if gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            parameter.grad = view

    def reduce(self) -> None:
        """Sum over the ranks, once per optimizer step, in a fixed order on every rank."""
        for name, parameter in self.parameters.items():
            view = self.views[parameter]
            assert view is not None, "made with the buffer"
            if parameter.grad is None:
                parameter.grad = view.zero_()
            assert parameter.grad.data_ptr() == view.data_ptr(), f"the gradient of {name} has left its buffer"
        dist.all_reduce(self.buffer, group=self.group)

    def gradients(self) -> Sequence[Tensor]:
        """Return the buffer."""
        return [self.buffer]


class WholeGradients:
    """Gradients of parameters that a rank has whole.

    Args:
        model: its parameters.
        mesh: the groups to sum over.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        roles = roles_of(model)
        self.parameters = dict(model.named_parameters())
        experts = {name: p for name, p in self.parameters.items() if roles[name].kind is Kind.EXPERT}
        self.dense = part_of({n: p for n, p in self.parameters.items() if n not in experts}, mesh.world)
        self.experts = part_of(experts, mesh.edp)

    def zero(self) -> None:
        """Start a step."""
        for part in (self.dense, self.experts):
            part.zero()

    def expect(self, is_last: bool) -> None:
        """Do nothing: what is added up here is reduced once, after the last backward pass."""

    def reduce(self) -> None:
        """Sum over the ranks, once per optimizer step, in a fixed order on every rank."""
        for part in (self.dense, self.experts):
            part.reduce()

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, fp64 scalar, equal on every rank; call after `reduce`.

        Each expert counts once: squares are added over the EP group, never over the replicas.
        """
        device = next(iter(self.parameters.values())).device
        dense, experts = (sum_of_squares(part.gradients(), device) for part in (self.dense, self.experts))
        dist.all_reduce(experts, group=self.mesh.ep)
        return (dense + experts).sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients with a scalar."""
        for part in (self.dense, self.experts):
            for gradient in part.gradients():
                gradient.mul_(factor.to(gradient.dtype))

    def first_nonfinite(self) -> str:
        """Return the name of the first parameter on this rank with an infinite or undefined gradient, or ''."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return name
        return ""


def part_of(parameters: dict[str, nn.Parameter], group: dist.ProcessGroup) -> OwnGradients | SummedGradients:
    """Return the gradients of parameters that a group of ranks holds."""
    is_alone = dist.get_world_size(group) == 1 or not parameters
    return OwnGradients(parameters) if is_alone else SummedGradients(parameters, group)


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all values, fp64 scalar."""
    squares = [squared_norm(tensor) for tensor in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares, fp64 scalar; 0 for an empty tensor.

    Squares of `ROW` values are added up in fp32 at least, the rows' sums in fp64: four times as fast as a sum in fp64
    of all, and 1e-8 from it. (A plain fp32 sum of 24 million values is 1e-3 off.)
    """
    values = x.detach().reshape(-1)
    rows = values.numel() // ROW * ROW
    dtype = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(values[:rows].view(-1, ROW), dim=1, dtype=dtype).to(torch.float64)
    rest: Tensor = torch.linalg.vector_norm(values[rows:], dtype=torch.float64)
    squared: Tensor = norms.square().sum() + rest.square()
    return squared


def flat_buffer(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return one buffer of zeros [number of values] and make it hold the parameters' gradients."""
    dtypes = {p.dtype for p in parameters}
    assert len(dtypes) == 1, f"parameters of several dtypes {dtypes} cannot share a buffer"
    size = sum(p.numel() for p in parameters)
    buffer = torch.zeros(size, dtype=dtypes.pop(), device=parameters[0].device)
    start = 0
    for parameter in parameters:
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return buffer
