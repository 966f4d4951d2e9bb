"""How much an expert, or a device, takes: a function of the tokens that compete for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limit:
    """Room as a function of the tokens that compete for it.

    ceil(factor · n · K / E), at least the minimum and at most what n tokens can ask for: the expert capacity of GShard
    (arXiv 2006.16668, algorithm 1) and, with devices in the place of experts, the budget of DeepSeek-V2 (arXiv
    2405.04434, section 2.2.4).

    Attributes:
        factor: relative to a balanced load.
        top_k: choices K per token.
        num_destinations: experts, or devices.
        per_token: choices of one token that can have the same destination.
        minimum: least room, in assignments.
        num_noops: no-op experts Z, which take their share of a balanced load: E + Z in the place of E.
    """

    factor: float
    top_k: int
    num_destinations: int
    per_token: int = 1
    minimum: int = 1
    num_noops: int = 0

    def of(self, num_tokens: int) -> int:
        """Return the room for a number n of tokens, in assignments."""
        balanced = math.ceil(self.factor * num_tokens * self.top_k / (self.num_destinations + self.num_noops))
        return min(num_tokens * self.per_token, max(self.minimum, balanced))

    def of_each(self, tokens_G: Tensor) -> Tensor:
        """Return the same for each of several numbers [G], int64, without waiting for the device."""
        asked_G = tokens_G.to(torch.float64) * self.factor * self.top_k
        # CUDA divides by a number as it multiplies by its inverse, which rounds otherwise; by a tensor it divides.
        sharing_G = torch.full_like(asked_G, self.num_destinations + self.num_noops)
        balanced_G = (asked_G / sharing_G).ceil().to(torch.int64)
        return torch.minimum(tokens_G * self.per_token, balanced_G.clamp(min=self.minimum))
