"""Who is admitted where room is limited: the first of each queue.

A choice waits in the queue of its group of tokens and its destination (an expert, or a device). Queues of the tokens of
one process are sorted; queues that run over several ranks are never brought together: ranks tell each other how many
wait, not who. Nothing here makes a table of tokens x experts or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.dist.peers import Alone, Peers

DIGIT_BITS = 8
"""Bits of a priority that ranks agree on per round: a message is a histogram of 2^8 counts per queue."""


@dataclass(frozen=True)
class Priority:
    """Who goes first in a queue; equal keys go by token, then by choice.

    Attributes:
        keys_TK: [T, K] int64, not negative, larger ones first.
        bits: all keys are below 2^bits.
    """

    keys_TK: Tensor
    bits: int


@dataclass(frozen=True)
class Queues:
    """The queues of one layer, with their room: number g · D + d is that of group g for destination d.

    Attributes:
        group_T: [T] int64, group of each token.
        num_destinations: number D of destinations.
        limits_Q: [Q] int64, how many each queue admits; the same on all peers.
        peers: the ranks that share these queues, with tokens in order of ranks.
    """

    group_T: Tensor
    num_destinations: int
    limits_Q: Tensor
    peers: Peers

    @property
    def num(self) -> int:
        """Number Q of queues; as an index it stands for none."""
        return len(self.limits_Q)

    def of(self, destinations_TK: Tensor, waiting_TK: Tensor) -> Tensor:
        """Return the queue [T, K] of each choice that waits, Q for the others."""
        return torch.where(waiting_TK, self.group_T.unsqueeze(1) * self.num_destinations + destinations_TK, self.num)

    def without(self, destinations_TK: Tensor, admitted_TK: Tensor) -> Queues:
        """Return the queues with the room that is left once these choices are in."""
        taken_Q = self.peers.sum(count(self.of(destinations_TK, admitted_TK), self.num))
        return replace(self, limits_Q=self.limits_Q - taken_Q)

    def admitted(self, destinations_TK: Tensor, waiting_TK: Tensor, priority: Priority | None) -> Tensor:
        """Return [T, K] bool: who is among the first of its queue.

        Args:
            destinations_TK: [T, K] int64.
            waiting_TK: [T, K] bool, who asks for room.
            priority: who goes first; None: by token, then by choice.
        """
        queue_TK = self.of(destinations_TK, waiting_TK)
        if priority is None:
            return self.places(queue_TK) < at(self.limits_Q, queue_TK)
        if isinstance(self.peers, Alone):
            return places(queue_TK, self.num, priority.keys_TK) < at(self.limits_Q, queue_TK)
        keys_Q, room_Q = self.thresholds(queue_TK, priority)
        threshold_TK = at(keys_Q, queue_TK)
        tied_TK = self.of(destinations_TK, waiting_TK & (priority.keys_TK == threshold_TK))
        return (waiting_TK & (priority.keys_TK > threshold_TK)) | (self.places(tied_TK) < at(room_Q, tied_TK))

    def places(self, queue_TK: Tensor) -> Tensor:
        """Return each choice's place [T, K] in its queue over all ranks, by token, then by choice; from 0."""
        before_Q = self.peers.before(count(queue_TK, self.num))
        return places(queue_TK, self.num) + at(before_Q, queue_TK)

    def thresholds(self, queue_TK: Tensor, priority: Priority) -> tuple[Tensor, Tensor]:
        """Find where each queue that runs over several ranks is full, by a radix select from the highest digit down.

        Returns:
            [Q] int64, the key with which its last place is taken (0: never), and [Q] int64, how many with that very key
            find room.
        """
        base = 1 << DIGIT_BITS
        keys_Q, room_Q = torch.zeros_like(self.limits_Q), self.limits_Q
        for shift in reversed(range(0, priority.bits, DIGIT_BITS)):
            digits_TK = (priority.keys_TK >> shift) % base
            undecided_TK = (priority.keys_TK >> shift >> DIGIT_BITS == at(keys_Q, queue_TK)) & (queue_TK < self.num)
            cells_TK = torch.where(undecided_TK, queue_TK * base + digits_TK, self.num * base)
            histogram_QM = self.peers.sum(count(cells_TK, self.num * base)).view(self.num, base)
            at_least_QM = histogram_QM.flip(1).cumsum(1).flip(1)
            # The largest digit which, with all larger ones, fills the room: these counts fall from left to right.
            digit_Q = ((at_least_QM >= room_Q.unsqueeze(1)).sum(dim=1) - 1).clamp(min=0)
            larger_Q = F.pad(at_least_QM, (0, 1)).gather(1, digit_Q.unsqueeze(1) + 1).squeeze(1)
            keys_Q, room_Q = keys_Q * base + digit_Q, room_Q - larger_Q
        return keys_Q, room_Q


def at(values_Q: Tensor, queue_TK: Tensor) -> Tensor:
    """Return the value [T, K] of each choice's queue, 0 for a choice that stands in none."""
    return F.pad(values_Q, (0, 1))[queue_TK]


def count(cells_TK: Tensor, num_cells: int) -> Tensor:
    """Return [num_cells] int64: how often each index occurs; num_cells is not counted.

    `torch.bincount` would wait for the device to learn the largest index.
    """
    cells_A = cells_TK.flatten()
    counts = torch.zeros(num_cells + 1, dtype=torch.int64, device=cells_A.device)
    return counts.scatter_add_(0, cells_A, torch.ones_like(cells_A))[:num_cells]


def places(queue_TK: Tensor, num_queues: int, keys_TK: Tensor | None = None) -> Tensor:
    """Return each choice's place [T, K] in its queue, from 0, among the choices of this process.

    Args:
        queue_TK: [T, K] int64, ``num_queues`` for none, where the place means nothing.
        num_queues: number of queues.
        keys_TK: [T, K] numbers, larger ones first; equal ones, and all without keys, go by token, then by choice.
    """
    queue_A = queue_TK.flatten()
    if keys_TK is None:
        order_A = torch.argsort(queue_A, stable=True)
    else:
        by_key_A = torch.argsort(keys_TK.flatten(), descending=True, stable=True)
        order_A = by_key_A[torch.argsort(queue_A[by_key_A], stable=True)]
    sorted_A = queue_A[order_A]
    starts = torch.searchsorted(sorted_A, torch.arange(num_queues + 1, device=queue_A.device))
    places_A = torch.empty_like(queue_A)
    places_A[order_A] = torch.arange(queue_A.numel(), device=queue_A.device) - starts[sorted_A]
    return places_A.view_as(queue_TK)


def admitted_reference(queue_TK: Tensor, limits_Q: Tensor, keys_TK: Tensor) -> Tensor:
    """Do what `Queues.admitted` does, queue by queue, with the choices of all ranks in one table."""
    queues, keys = queue_TK.flatten().tolist(), keys_TK.flatten().tolist()
    kept = [False] * len(queues)
    for queue, limit in enumerate(limits_Q.tolist()):
        waiting = [i for i, place in enumerate(queues) if place == queue]
        for i in sorted(waiting, key=lambda i: (-keys[i], i))[:limit]:
            kept[i] = True
    return torch.tensor(kept, dtype=torch.bool).view_as(queue_TK)
