"""Who stays in memory: the experts used most, where old uses count less and less."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence


class Hotness:
    """How much each expert was used: a sum over passes, in which each pass counts `decay` times the one after it.

    0 remembers the last pass only, towards 1 all passes count alike (least frequently used). A pass counts once for an
    expert, however many tokens chose it: what a cache can save is one load per pass.

    Args:
        num_held: experts L on this rank.
        decay: between 0 and 1.
    """

    def __init__(self, num_held: int, decay: float) -> None:
        self.decay = decay
        self.scores_L = [0.0] * num_held

    def count(self, counts: Sequence[int]) -> None:
        """Take a pass into account: rows of each expert, by place."""
        self.scores_L = [self.decay * score + (count > 0) for score, count in zip(self.scores_L, counts, strict=True)]

    def coldest(self, places: Iterable[int]) -> int:
        """Return the place used least; of several the first."""
        return min(places, key=lambda place: self.scores_L[place])

    def is_hotter(self, place: int, other: int) -> bool:
        """Whether an expert is used more than another: a tie moves nothing."""
        return self.scores_L[place] > self.scores_L[other]


def in_turn(counts: Sequence[int], held: Container[int]) -> tuple[list[int], list[int]]:
    """Return the places that a pass needs: those in memory, which are used before any makes room, and the others."""
    needed = [place for place, count in enumerate(counts) if count]
    return [place for place in needed if place in held], [place for place in needed if place not in held]
