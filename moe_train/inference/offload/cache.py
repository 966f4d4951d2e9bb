"""The experts of a layer that are in memory, and the one that is on its way through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moe_train.inference.offload.policy import Hotness, in_turn

DECAY = 0.98
"""Of `Hotness`, chosen by replaying the choices of a trained model (docs/offload.md)."""


@dataclass
class Traffic:
    """What was found in memory and what was read.

    Attributes:
        hits: experts that a pass needed and that were in memory.
        misses: experts that it needed and that were read.
        read_bytes: values read.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0


@dataclass
class Buffers:
    """Memory for single experts, used again and again: layers whose experts have one shape share it.

    Attributes:
        make: returns memory for one more.
        made: how many there are.
        free: those that nobody uses.
    """

    make: Callable[[], list[Tensor]]
    made: int = 0
    free: list[list[Tensor]] = field(default_factory=list)

    def take(self) -> list[Tensor]:
        """Return memory for one expert, with any values."""
        if self.free:
            return self.free.pop()
        self.made += 1
        return self.make()

    def give(self, tensors: list[Tensor]) -> None:
        """Take memory back."""
        self.free.append(tensors)


class Cache:
    """Experts in memory, by place: never more than `size`, and one more while a pass visits it.

    Args:
        size: how many stay.
        num_held: experts L of the layer on this rank.
        load: fills memory with the expert at a place.
        buffers: where memory comes from.
        expert_bytes: size of one.
    """

    def __init__(
        self, size: int, num_held: int, load: Callable[[int, Sequence[Tensor]], None], buffers: Buffers,
        expert_bytes: int,
    ) -> None:  # fmt: skip
        self.size, self.load, self.buffers, self.expert_bytes = size, load, buffers, expert_bytes
        self.hotness = Hotness(num_held, DECAY)
        self.held: dict[int, list[Tensor]] = {}
        self.traffic = Traffic()

    def visit(self, counts: Sequence[int]) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield each expert that a pass needs, by place: those in memory first, so that none is read twice.

        The tensors may be used until the next is asked for.

        Args:
            counts: rows of each expert, by place.
        """
        self.hotness.count(counts)
        hits, misses = in_turn(counts, self.held)
        self.traffic.hits += len(hits)
        for place in hits:
            yield place, self.held[place]
        for place in misses:
            passing = self.buffers.take()
            try:
                self.load(place, passing)
                self.traffic.misses += 1
                self.traffic.read_bytes += self.expert_bytes
                yield place, passing
            except BaseException:
                self.buffers.give(passing)
                raise
            self._keep_or_drop(place, passing)

    def _keep_or_drop(self, place: int, passing: list[Tensor]) -> None:
        if len(self.held) >= self.size:
            coldest = self.hotness.coldest(self.held)
            if not self.hotness.is_hotter(place, coldest):
                self.buffers.give(passing)
                return
            self.buffers.give(self.held.pop(coldest))
        self.held[place] = passing
