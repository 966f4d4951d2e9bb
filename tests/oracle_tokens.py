"""The tokens of the oracle: one object each, with its place in the global batch and its random draws."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

JITTER, NOISE, SECOND_EXPERT, DISPATCH, EXPERT_DROPOUT, OVERFLOW, EXEMPTION, TOKEN_DROPOUT = range(1, 9)
"""Purposes of draws."""
MASK = 2**64 - 1


def splitmix64(seed: int, counter: int) -> int:
    """Output ``counter`` of the generator, an unsigned number (Steele, Lea and Flood 2014, figure 16)."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def derived(*parts: int) -> int:
    """One seed of several numbers."""
    state = 0
    for part in parts:
        state = splitmix64(state + part, 0)
    return state >> 1


def top_bits(seed: int, counter: int) -> int:
    """23 random bits."""
    return splitmix64(seed, counter) >> 41


def unit(seed: int, counter: int) -> float:
    """A number strictly between 0 and 1 that fp32 holds exactly."""
    return (top_bits(seed, counter) + 0.5) / 2**23


@dataclass
class Token:
    """One token of a global batch in one layer.

    Attributes:
        x_D: the layer's normed input.
        id: in the vocabulary.
        sequence: place of its sequence in the global batch.
        position: in its sequence.
        length: positions of a sequence.
        groups: number of the group of tokens that it shares a capacity or a loss with: of its step, its pass (the
            micro-batch of all ranks), its rank's part of that, its sequence.
        seed: of this layer's draws in this step.
    """

    x_D: Tensor
    id: int
    sequence: int
    position: int
    length: int
    groups: dict[str, int]
    seed: int

    @property
    def place(self) -> int:
        """In the global batch."""
        return self.sequence * self.length + self.position

    def draws(self, purpose: int, num: int) -> list[float]:
        """``num`` numbers in (0, 1) of this token's own."""
        seed = derived(self.seed, purpose)
        return [unit(seed, self.place * num + j) for j in range(num)]

    def overflow_bits(self, num: int) -> list[int]:
        """Who is kept when the policy is random: larger first."""
        seed = derived(self.seed, OVERFLOW)
        return [top_bits(seed, self.place * num + j) for j in range(num)]

    @property
    def exemption(self) -> float:
        """The draw of its sequence."""
        return unit(derived(self.seed, EXEMPTION), self.sequence)


def by_group(tokens: list[Token], kind: str) -> list[list[int]]:
    """Indices of the tokens of each group, in order."""
    groups: dict[int, list[int]] = {}
    for t, token in enumerate(tokens):
        groups.setdefault(token.groups[kind], []).append(t)
    return list(groups.values())
