"""Collectives that travel while other work is done, forwards and backwards.

Each comes in two halves: an operator starts it and returns the buffer into which it writes, and `Underway.arrive` waits
for it. The gradient of the second half starts the adjoint collective, that of the first waits for it: work that lies
between the halves hides the forward collective in the forward pass and the adjoint one in the backward pass.

Beside its buffer each collective has a ticket, a tensor of one meaningless value, which is what autograd sees of it:
the gradient of a ticket is the ticket of the adjoint collective. (A buffer cannot stand there: its gradient would have
to be of its own shape, and what comes back has that of what was sent.)

The starting halves are custom operators, whose results selective activation checkpointing can keep; it then finds the
buffer filled. What a second forward pass starts and, ended early, never waits for, is forgotten once it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from moe_train.dist.comm import all_gather, group_named, num_bytes, reduce_scatter, row_bytes
from moe_train.dist.meter import METER
from moe_train.dist.riders import pack, values_of

Started: TypeAlias = tuple[Tensor, Tensor]
"""Buffer and ticket."""


@dataclass(frozen=True)
class Flight:
    """A collective that was started.

    Attributes:
        work: to wait for.
        tensors: what it reads, what it writes, and its ticket: kept, so that no other ticket gets the same address.
    """

    work: dist.Work
    tensors: tuple[Tensor, Tensor, Tensor]


FLIGHTS: dict[int, Flight] = {}
"""By address of the ticket, of this process: autograd and checkpoints hand on tensors, but nothing beside them."""
GRADIENTS: dict[int, Tensor] = {}
"""Buffers of adjoint collectives, by address of their tickets."""


@dataclass(frozen=True)
class Underway:
    """Rows on their way.

    Attributes:
        buffer: where they will be; not to be read before they have arrived.
        ticket: of the collective.
        adjoint: starts the way back of their gradient.
        finish: what is made of them when they have arrived, of which ``adjoint`` gets the gradient; None: nothing.
    """

    buffer: Tensor
    ticket: Tensor
    adjoint: Callable[[Tensor], Started]
    finish: Callable[[Tensor], Tensor] | None = None

    def arrive(self) -> Tensor:
        """Wait for the rows and return them; on an accelerator it is the stream that waits. To be called once."""
        rows: Tensor = _Arrive.apply(  # type: ignore[no-untyped-call]
            self.buffer.detach(), self.ticket, self.adjoint, self.finish
        )
        return rows


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        buffer: Tensor,
        ticket: Tensor,
        adjoint: Callable[[Tensor], Started],
        finish: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.adjoint = adjoint
        land(ticket)
        return buffer.view_as(buffer) if finish is None else finish(buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        if torch.is_grad_enabled():  # a second derivative would not find its way, and be zero
            raise RuntimeError("an exchange can be differentiated once only (create_graph=True)")
        buffer, ticket = ctx.adjoint(grad)
        GRADIENTS[ticket.data_ptr()] = buffer
        return None, ticket, None, None


def land(ticket: Tensor) -> None:
    """Wait for the collective of a ticket, if it is still underway."""
    flight = FLIGHTS.pop(ticket.data_ptr(), None)
    if flight is not None:
        # Gloo's reduce-scatter copies its result here: a buffer that is filled, not one that was changed after its use.
        _, buffer, _ = flight.tensors
        with METER.timed(ticket.device), _unsafe_preserve_version_counter(buffer):
            flight.work.wait()


def take_off(start: Callable[[], dist.Work | None], source: Tensor, buffer: Tensor, ticket: Tensor) -> Started:
    """Start a collective and remember it until somebody waits for it; forget those for which nobody did.

    Args:
        start: starts it.
        source: what it reads.
        buffer: what it writes, or a tensor of which that is a part.
        ticket: of the dtype of the values that travel, which a gradient has, too.
    """
    for address in [address for address, flight in FLIGHTS.items() if flight.work.is_completed()]:
        FLIGHTS.pop(address).work.wait()  # does not wait, but raises the error of one that failed
    with METER.timed(buffer.device):
        work = start()
    assert work is not None, "this rank is not in the group"
    FLIGHTS[ticket.data_ptr()] = Flight(work, (source, buffer, ticket))
    return buffer, ticket


def ticket_of(x: Tensor) -> Tensor:
    """Return a new ticket for values of this dtype."""
    return x.new_empty(1)


@torch.library.custom_op("moe_train::start_rows", mutates_args=())
def start_rows(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Started:
    """Start what `all_to_all_rows` does; return buffer and ticket."""
    group = group_named(group_name)
    METER.count(group, [rows * row_bytes(x_ND) for rows in sent])
    source, buffer = x_ND.contiguous(), x_ND.new_empty((sum(received), *x_ND.shape[1:]))

    start = partial(dist.all_to_all_single, buffer, source, received, sent, group=group, async_op=True)
    return take_off(start, source, buffer, ticket_of(x_ND))


@start_rows.register_fake
def _(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Started:
    return x_ND.new_empty((sum(received), *x_ND.shape[1:])), ticket_of(x_ND)


@torch.library.custom_op("moe_train::start_gather", mutates_args=())
def start_gather(x_ND: Tensor, riders_NM: Tensor | None, num_ranks: int, group_name: str) -> Started:
    """Start what `gather_rows_of_all` does, with integers beside the rows or without; return buffer and ticket."""
    group, source = group_named(group_name), pack(x_ND, riders_NM).contiguous()
    METER.count(group, [num_bytes(source)] * num_ranks)
    buffer = source.new_empty((num_ranks * len(source), *source.shape[1:]))
    start = partial(all_gather, buffer, source, group=group, async_op=True)
    return take_off(start, source, buffer, ticket_of(x_ND))


@start_gather.register_fake
def _(x_ND: Tensor, riders_NM: Tensor | None, num_ranks: int, group_name: str) -> Started:
    source = pack(x_ND, riders_NM)
    return source.new_empty((num_ranks * len(source), *source.shape[1:])), ticket_of(x_ND)


@torch.library.custom_op("moe_train::start_sum", mutates_args=())
def start_sum(x_ND: Tensor, num_ranks: int, group_name: str) -> Started:
    """Start what `sum_rows_of_all` does; return buffer and ticket."""
    group = group_named(group_name)
    METER.count(group, [num_bytes(x_ND) // num_ranks] * num_ranks)
    source, buffer = x_ND.contiguous(), x_ND.new_empty((len(x_ND) // num_ranks, *x_ND.shape[1:]))
    start = partial(reduce_scatter, buffer, source, group=group, async_op=True)
    return take_off(start, source, buffer, ticket_of(x_ND))


@start_sum.register_fake
def _(x_ND: Tensor, num_ranks: int, group_name: str) -> Started:
    return x_ND.new_empty((len(x_ND) // num_ranks, *x_ND.shape[1:])), ticket_of(x_ND)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Started) -> None:
    """Keep what `landed_backward` needs, for autograd."""
    ctx.num_others = len(inputs) - 1
    ctx.set_materialize_grads(False)  # the buffer has none


def landed(grad_buffer: None, ticket: Tensor) -> Tensor:
    """Wait for what an adjoint collective brings, given the gradients of an operator's buffer and ticket."""
    assert grad_buffer is None, "rows were read before they arrived"
    grad_ND = GRADIENTS.pop(ticket.data_ptr())
    land(ticket)
    return grad_ND


def landed_backward(ctx: Any, grad_buffer: None, ticket: Tensor) -> tuple[Tensor | None, ...]:
    """Give the first argument of an operator its gradient."""
    return landed(grad_buffer, ticket), *(None for _ in range(ctx.num_others))


for _operator in (start_rows, start_gather, start_sum):
    _operator.register_autograd(landed_backward, setup_context=setup)


def send_rows(x_ND: Tensor, received: list[int], sent: list[int], group_name: str) -> Underway:
    """Start `all_to_all_rows`."""
    buffer, ticket = start_rows(x_ND, received, sent, group_name)
    return Underway(buffer, ticket, lambda grad_RD: start_rows(grad_RD, sent, received, group_name))


def send_to_all(x_ND: Tensor, num_ranks: int, group_name: str, riders_NM: Tensor | None = None) -> Underway:
    """Start `gather_rows_of_all`. Integers that ride beside the rows are found in the buffer (`riders_of`)."""
    buffer, ticket = start_gather(x_ND, riders_NM, num_ranks, group_name)
    finish = None if riders_NM is None else partial(values_of, num_riders=riders_NM.shape[1], dtype=x_ND.dtype)
    return Underway(buffer, ticket, lambda grad_RD: start_sum(grad_RD, num_ranks, group_name), finish)


def send_sums(x_ND: Tensor, num_ranks: int, group_name: str) -> Underway:
    """Start `sum_rows_of_all`."""
    buffer, ticket = start_sum(x_ND, num_ranks, group_name)
    return Underway(buffer, ticket, lambda grad_RD: start_gather(grad_RD, None, num_ranks, group_name))
