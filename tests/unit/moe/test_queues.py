"""Who is admitted: queues of one process against a plain loop, and what queues over ranks cost. (Over real ranks:
test_capacity_over_ranks.)"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import in_parts
from torch import Tensor
from waiting import NoWaiting

from moe_train.dist.peers import Alone, Peers
from moe_train.moe.queues import Priority, Queues, admitted_reference, places

QUICK = settings(max_examples=80, deadline=None)
BITS = (1, 5, 8, 23, 31, 40)


@dataclass(frozen=True)
class Waiting:
    """Choices of a batch in rows of tokens, one group per row of ``length`` tokens."""

    destinations_TK: Tensor
    waiting_TK: Tensor
    keys_TK: Tensor
    bits: int
    num_destinations: int
    length: int
    limits_Q: Tensor

    def queues(self, peers: Peers, num_tokens: int) -> Queues:
        group_T = torch.arange(num_tokens) // self.length
        return Queues(group_T, self.num_destinations, self.limits_Q, peers)


@st.composite
def batches(draw: st.DrawFn, one_group: bool = False) -> Waiting:
    """Few destinations and few distinct keys, so that queues are long and ties are frequent."""
    groups, length, top_k, destinations = (draw(st.integers(1, high)) for high in (3, 6, 3, 4))
    length, groups = (length * groups, 1) if one_group else (length, groups)
    size, bits = groups * length * top_k, draw(st.sampled_from(BITS))
    few = draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=4))
    rows = {
        "destinations_TK": draw(st.lists(st.integers(0, destinations - 1), min_size=size, max_size=size)),
        "waiting_TK": draw(st.lists(st.booleans(), min_size=size, max_size=size)),
        "keys_TK": draw(st.lists(st.sampled_from(few), min_size=size, max_size=size)),
    }
    num_queues = groups * destinations
    limits_Q = torch.tensor(draw(st.lists(st.integers(0, 8), min_size=num_queues, max_size=num_queues)))
    tables = {name: torch.tensor(row).view(-1, top_k) for name, row in rows.items()}
    return Waiting(**tables, bits=bits, num_destinations=destinations, length=length, limits_Q=limits_Q)


def expected(case: Waiting, ranked: bool) -> Tensor:
    queues = case.queues(Alone(), len(case.keys_TK))
    queue_TK = queues.of(case.destinations_TK, case.waiting_TK)
    return admitted_reference(queue_TK, case.limits_Q, case.keys_TK if ranked else torch.zeros_like(case.keys_TK))


def found(case: Waiting, ranked: bool, peers: Peers, tokens: slice = slice(None)) -> Tensor:
    keys_TK = case.keys_TK[tokens]
    queues = case.queues(peers, len(keys_TK))
    priority = Priority(keys_TK, case.bits) if ranked else None
    return queues.admitted(case.destinations_TK[tokens], case.waiting_TK[tokens], priority)


@QUICK
@given(batches(), st.booleans())
def test_queues_of_one_process_equal_a_plain_loop(case: Waiting, ranked: bool) -> None:
    assert torch.equal(found(case, ranked, Alone()), expected(case, ranked))


@settings(max_examples=60, deadline=None)
@given(batches(one_group=True), st.booleans(), st.integers(2, 4))
def test_queues_over_parts_equal_a_plain_loop_over_all(case: Waiting, ranked: bool, num_parts: int) -> None:
    """Parts of any size, even none: the queue is one."""
    cuts = [len(case.keys_TK) * part // num_parts for part in range(num_parts + 1)]

    def part(index: int, peers: Peers) -> Tensor:
        return found(case, ranked, peers, slice(cuts[index], cuts[index + 1]))

    assert torch.equal(torch.cat(in_parts(part, num_parts)), expected(case, ranked))


@QUICK
@given(batches(), st.integers(0, 17))
def test_by_token_nobody_depends_on_a_later_token(case: Waiting, cut: int) -> None:
    end = cut % len(case.keys_TK) + 1
    sooner = found(case, False, Alone(), slice(0, end))
    assert torch.equal(found(case, False, Alone())[:end], sooner)


@QUICK
@given(batches())
def test_places_count_from_zero_without_gaps(case: Waiting) -> None:
    queues = case.queues(Alone(), len(case.keys_TK))
    queue_TK = queues.of(case.destinations_TK, case.waiting_TK)
    places_TK = places(queue_TK, queues.num, case.keys_TK)
    for queue in range(queues.num):
        waiting = places_TK[queue_TK == queue]
        assert sorted(waiting.tolist()) == list(range(len(waiting)))


@QUICK
@given(batches(), st.booleans())
def test_room_shrinks_by_those_admitted(case: Waiting, ranked: bool) -> None:
    queues, kept_TK = case.queues(Alone(), len(case.keys_TK)), found(case, ranked, Alone())
    left = queues.without(case.destinations_TK, kept_TK)
    refused_TK = case.waiting_TK & ~kept_TK
    full_Q = left.limits_Q == 0
    assert (left.limits_Q >= 0).all()
    assert full_Q[queues.of(case.destinations_TK, refused_TK)[refused_TK]].all(), "refused, though there was room"


@dataclass
class Recorder:
    """One rank that believes to be one of several, and notes what it would send."""

    sums: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)

    def sum(self, x: Tensor) -> Tensor:
        self.sums.append(x.numel())
        return x.clone()

    def before(self, x: Tensor) -> Tensor:
        self.prefixes.append(x.numel())
        return torch.zeros_like(x)

    def gather(self, x_TD: Tensor) -> Any:
        raise AssertionError("candidates must not be gathered")


@pytest.mark.parametrize(("bits", "rounds"), [(0, 0), (1, 1), (8, 1), (9, 2), (23, 3), (31, 4), (33, 5)])
def test_ranks_exchange_counts_only_and_one_message_per_digit(bits: int, rounds: int) -> None:
    recorder, destinations = Recorder(), 4
    experts_TK = torch.arange(1000).view(500, 2) % destinations
    queues = Queues(torch.zeros(500, dtype=torch.int64), destinations, torch.full((destinations,), 10), recorder)
    priority = Priority(torch.zeros_like(experts_TK), bits) if bits else None
    queues.admitted(experts_TK, torch.ones_like(experts_TK, dtype=torch.bool), priority)
    assert recorder.sums == [destinations * 256] * rounds
    assert recorder.prefixes == [destinations]


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("peers", [Alone(), Recorder()])
def test_nothing_waits_for_the_device(ranked: bool, peers: Peers) -> None:
    destinations_TK = torch.arange(12).view(6, 2) % 3
    priority = Priority(destinations_TK, 8) if ranked else None
    waiting_TK = destinations_TK > 0
    queues = Queues(torch.zeros(6, dtype=torch.int64), 3, torch.tensor([1, 2, 3]), peers)
    with NoWaiting():
        queues.without(destinations_TK, queues.admitted(destinations_TK, waiting_TK, priority))
