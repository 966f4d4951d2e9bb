"""Tokens on their way to experts and home: legs, journeys of them, and all journeys of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from moe_train.dist.underway import Underway
from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import DenseExchange


@dataclass(frozen=True)
class Cargo:
    """Tokens with what experts must know of them.

    Attributes:
        rows_RD: [R, D] tokens.
        experts_RK: [R, K] int64, index of each choice among the experts that can be reached from here, or their number
            where the choice is not kept or lives elsewhere.
        weights_RK: [R, K] weight of each choice, at least fp32; meaningless where there is no expert.
    """

    rows_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor


@dataclass(frozen=True)
class Arrived:
    """Tokens at the place of their experts.

    Attributes:
        rows_RD: [R, D] tokens.
        experts_RK: [R, K] int64, index among this rank's L experts of each choice, or L where the choice is not kept or
            lives elsewhere.
        weights_RK: [R, K] weight of each choice, at least fp32; meaningless where the expert is L.
        num_assignments: number of entries of experts_RK below L.
        journey: the way home; None for tokens that came from nowhere.
    """

    rows_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor
    num_assignments: int
    journey: Journey | None


class Leg(Protocol):
    """One collective out and one back, begun when it is made."""

    def arrive(self) -> Cargo:
        """Wait for what comes to this rank."""

    def start_back(self, sums_RD: Tensor) -> Underway:
        """Begin to send what was made of each row that came back to where it came from."""

    def end_back(self, parts_ND: Tensor) -> Tensor:
        """Add up what came back for each row that was sent from here."""


class Journey:
    """Some of a layer's tokens on their way out and home, each leg begun when the one before it has ended.

    Args:
        start: the first leg; or the tokens, if there is none.
        num_assignments: how many will arrive on this rank.
        ahead: makes the leg that begins with a cargo, for each further leg in turn.
    """

    def __init__(self, start: Cargo | Leg, num_assignments: int, ahead: Sequence[Callable[[Cargo], Leg]] = ()) -> None:
        self._cargo = start if isinstance(start, Cargo) else None
        self._gone: list[Leg] = [] if isinstance(start, Cargo) else [start]
        self._ahead = list(ahead)
        self._num_assignments = num_assignments
        self._homeward: Underway | None = None
        self._sums: Tensor | None = None

    def _take(self) -> Cargo:
        """Return what the last leg brought, or what the journey began with, and hold it no longer."""
        cargo = self._gone[-1].arrive() if self._cargo is None else self._cargo
        self._cargo = None
        return cargo

    def go_on(self) -> None:
        """Begin the next leg out, if there is one, with what the one before brings."""
        if self._ahead:
            begin = self._ahead.pop(0)
            self._gone.append(begin(self._take()))

    def arrived(self) -> Arrived:
        """Go all the way out and return what comes to this rank."""
        while self._ahead:
            self.go_on()
        cargo = self._take()
        return Arrived(cargo.rows_RD, cargo.experts_RK, cargo.weights_RK, self._num_assignments, self)

    def turn_back(self, sums_RD: Tensor) -> None:
        """Begin the first leg home with the sums [R, D] of what arrived."""
        self._sums = sums_RD
        self._begin_back()

    def _begin_back(self) -> None:
        if self._gone and self._sums is not None:
            self._homeward, self._sums = self._gone[-1].start_back(self._sums), None

    def _end_back(self) -> None:
        assert self._homeward is not None, "no leg home was begun"
        self._sums, self._homeward = self._gone.pop().end_back(self._homeward.arrive()), None
        self._begin_back()

    def go_on_home(self) -> None:
        """Begin the last leg home, if another one leads there."""
        if self._homeward is not None and len(self._gone) > 1:
            self._end_back()

    def home(self) -> Tensor:
        """Go all the way home and return the sum [T, D] of each token."""
        while self._homeward is not None:
            self._end_back()
        assert self._sums is not None, "these tokens have not turned back"
        return self._sums


@dataclass(frozen=True)
class Transit:
    """All tokens of a layer, on one journey or, cut into parts, on several that follow each other.

    While the experts work on one part the next is on its way to them, and the last on its way home: each journey makes
    one leg per turn. Every rank takes the same turns, so that collectives meet.

    Attributes:
        journeys: of the parts, in order of tokens.
    """

    journeys: list[Journey]

    def __iter__(self) -> Iterator[Arrived]:
        """Yield what arrives; each is to be answered with `send_home` before the next is asked for."""
        self.journeys[0].go_on()
        for last, journey, following in zip_longest([None, *self.journeys[:-1]], self.journeys, self.journeys[1:]):
            if following is not None:
                following.go_on()
            assert journey is not None, "the middle list is the longest"
            yield journey.arrived()
            if last is not None:
                last.go_on_home()

    def send_home(self, sums_RD: Tensor, arrived: Arrived) -> None:
        """Begin the way home of what the experts here made of one part: [R, D]."""
        assert arrived.journey in self.journeys, "these tokens did not come by this exchange"
        arrived.journey.turn_back(sums_RD)

    def home(self) -> Tensor:
        """Wait for all tokens and return each one's sum [T, D]."""
        for journey in self.journeys:
            journey.go_on_home()
        sums = [journey.home() for journey in self.journeys]
        return sums[0] if len(sums) == 1 else torch.cat(sums)


class Exchange(Protocol):
    """Brings tokens to experts and sums back."""

    @property
    def experts(self) -> range:
        """Places of the experts that this rank holds; their global indices, unless experts have moved."""

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts, which are held in the same places."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send this rank's tokens [T, D] off to the ranks of their experts."""

    def for_experts(self, num_experts: int) -> Exchange:
        """Return the exchange of a layer with so many experts over the same ranks, without buffers of fixed size."""


def split(x_TD: Tensor, plan: Plan, num_parts: int) -> list[tuple[Tensor, Plan]]:
    """Cut tokens and plan into runs of tokens as even as can be; some may be empty. Plans with slots stay whole."""
    if num_parts == 1:
        return [(x_TD, plan)]
    assert plan.slots is None, "buffers of fixed size travel whole"
    tables = zip(
        *(t.tensor_split(num_parts) for t in (x_TD, plan.experts_TK, plan.weights_TK, plan.kept_TK)), strict=True
    )
    return [
        (part_TD, replace(plan, experts_TK=experts_TK, weights_TK=weights_TK, kept_TK=kept_TK, rerouted_TK=None))
        for part_TD, experts_TK, weights_TK, kept_TK in tables
    ]
