"""Collectives in two halves: the same values and gradients as in one, whatever happens between the halves."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_train.dist.comm import all_to_all_rows, gather_rows_of_all, sum_rows_of_all
from moe_train.dist.meter import METER, Meter
from moe_train.dist.riders import riders_of
from moe_train.dist.underway import FLIGHTS, GRADIENTS, send_rows, send_sums, send_to_all, start_rows
from moe_train.dist.world import World

WIDTH = 3


def table_of(size: int) -> Tensor:
    """Rows by source and destination, zeros among them; the last rank sends nothing."""
    table_PP = torch.randint(-2, 4, (size, size), generator=torch.Generator().manual_seed(5)).clamp(min=0)
    table_PP[-1] = 0
    return table_PP


def both_ways(world: World):
    """Each collective in one and in two halves, with the number of rows that it takes."""
    table_PP, name, size = table_of(world.size), dist.group.WORLD.group_name, world.size
    sent, received = table_PP[world.rank].tolist(), table_PP[:, world.rank].tolist()
    yield sum(sent), lambda x: all_to_all_rows(x, received, sent, name), lambda x: send_rows(x, received, sent, name)
    yield 2, lambda x: gather_rows_of_all(x, size, name), lambda x: send_to_all(x, size, name)
    yield 0, lambda x: gather_rows_of_all(x, size, name), lambda x: send_to_all(x, size, name)
    yield 2 * size, lambda x: sum_rows_of_all(x, size, name), lambda x: send_sums(x, size, name)


def rows(rank: int, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-9, 10, (num, WIDTH), generator=generator).double().requires_grad_()


def check_equal(world: World) -> None:
    for num, whole, start in both_ways(world):
        x_ND, same_ND = rows(world.rank, num), rows(world.rank, num)
        there_RD, underway = whole(x_ND), start(same_ND)
        assert underway.ticket.data_ptr() in FLIGHTS
        arrived_RD = underway.arrive()
        assert torch.equal(arrived_RD, there_RD)
        y_RD = rows(10 + world.rank, len(there_RD)).detach()
        there_RD.backward(y_RD)
        arrived_RD.backward(y_RD)
        assert torch.equal(same_ND.grad, x_ND.grad)
        products = torch.stack([(arrived_RD * y_RD).sum(), (x_ND * same_ND.grad).sum()]).detach()
        dist.all_reduce(products)
        assert products[0] == products[1], "<A x, y> = <x, A' y>"
        assert (FLIGHTS, GRADIENTS) == ({}, {})


def check_several_at_once(world: World) -> None:
    """All are started before the first has arrived, they arrive in another order, and so do their gradients."""
    x_ND = rows(world.rank, 2)
    name, size = dist.group.WORLD.group_name, world.size
    underway = [send_to_all(x_ND * factor, size, name) for factor in range(1, 5)]
    assert len(FLIGHTS) >= 1, "some may already be there"
    sums = [underway[place].arrive().sum() for place in (2, 0, 3, 1)]
    torch.stack(sums).sum().backward()
    assert torch.equal(x_ND.grad, torch.full_like(x_ND, 10.0 * size))
    assert (FLIGHTS, GRADIENTS) == ({}, {})


def check_integers_and_no_grad(world: World) -> None:
    name, size = dist.group.WORLD.group_name, world.size
    ids = torch.arange(4, dtype=torch.int32).view(2, 2) + world.rank
    assert torch.equal(send_to_all(ids, size, name).arrive(), gather_rows_of_all(ids, size, name))
    x_ND = rows(world.rank, 2)
    with torch.no_grad():
        assert not send_to_all(x_ND, size, name).arrive().requires_grad


def check_riders(world: World) -> None:
    """Integers come in the same collective; the gradient of the values travels alone."""
    name, size = dist.group.WORLD.group_name, world.size
    x_ND, riders_NM = rows(world.rank, 3), torch.arange(6).view(3, 2) + 10 * world.rank
    METER.take_ms()
    both = send_to_all(x_ND, size, name, riders_NM)
    arrived_RD = both.arrive()
    assert (METER.calls, METER.sent_bytes) == (1, size * 3 * (2 * 4 + WIDTH * 8))
    assert torch.equal(arrived_RD, torch.cat([rows(rank, 3) for rank in range(size)]))
    expected = torch.cat([torch.arange(6).view(3, 2) + 10 * rank for rank in range(size)])
    assert torch.equal(riders_of(both.buffer, 2), expected)
    (arrived_RD * torch.arange(len(arrived_RD)).unsqueeze(1)).sum().backward()
    assert (METER.calls, METER.sent_bytes) == (2, size * 3 * (2 * 4 + 2 * WIDTH * 8))
    assert torch.equal(
        x_ND.grad, size * torch.arange(3.0).double().unsqueeze(1).expand(3, WIDTH) + size * 3 * world.rank
    )
    METER.take_ms()


def check_forgotten(world: World) -> None:
    """What nobody waits for is let go of when the next one starts after it has arrived, its memory with it."""
    name, size = dist.group.WORLD.group_name, world.size
    lost = send_to_all(rows(world.rank, 2), size, name)
    address = lost.ticket.data_ptr()
    FLIGHTS[address].work.wait()
    dist.barrier()
    kept = lost.ticket  # so that its address is not used again
    del lost
    gc.collect()
    assert address in FLIGHTS
    send_to_all(rows(world.rank, 2), size, name).arrive()
    assert address not in FLIGHTS, kept


def check_second_derivative_is_refused(world: World) -> None:
    """Rather than wrong: the halves have first derivatives only."""
    x_ND = rows(world.rank, 2)
    there_RD = send_to_all(x_ND, world.size, dist.group.WORLD.group_name).arrive()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(there_RD.square().sum(), x_ND, create_graph=True)


def check_hidden_time(world: World) -> None:
    """The meter counts what the process waited for, not what was underway while it worked."""
    name, size = dist.group.WORLD.group_name, world.size
    METER.take_ms()
    underway = send_to_all(rows(world.rank, 2).detach(), size, name)
    torch.manual_seed(0)
    while not FLIGHTS[underway.ticket.data_ptr()].work.is_completed():
        torch.randn(100, 100).sum()
    underway.arrive()
    assert METER.calls == 1
    assert METER.sent_bytes == size * 2 * WIDTH * 8
    METER.take_ms()


def check_fake(world: World) -> None:
    with FakeTensorMode():
        x_ND = torch.empty(5, WIDTH)
        buffer, ticket = start_rows(x_ND, [4, 3], [2, 3], dist.group.WORLD.group_name)
    assert (buffer.shape, ticket.shape) == ((7, WIDTH), (1,))


def checks(world: World) -> None:
    for check in (
        check_equal,
        check_several_at_once,
        check_integers_and_no_grad,
        check_riders,
        check_forgotten,
        check_second_derivative_is_refused,
        check_hidden_time,
        check_fake,
    ):
        check(world)


def test_collectives_in_two_halves() -> None:
    run_ranks(checks, 2)


def bytes_by_link(world: World) -> tuple[int, int, int]:
    meter = Meter(node_size=2)
    meter.count(dist.group.WORLD, [1, 10, 100, 1000])
    return meter.sent_bytes, meter.inside_bytes, meter.between_bytes


def test_bytes_by_link() -> None:
    """Own bytes are neither."""
    assert run_ranks(bytes_by_link, 4) == [
        (1111, 10, 1100),
        (1111, 1, 1100),
        (1111, 1000, 11),
        (1111, 100, 11),
    ]
