"""How much one expert has to say to another about a token: the part of a message's strength that depends on content."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.moe.modules import Linear

LEAST_NORM = 1e-12
"""A shorter vector has no direction: it has cosine 0 with everything, and its cosines have no gradient."""


class Similarity(Protocol):
    """Gives a_ij to all pairs of a token's experts."""

    def __call__(self, h_TED: Tensor) -> Tensor:
        """Return [T, E, E] for receiver i (row) and sender j (column), from what the experts hold [T, E, D]."""


class PairGate(nn.Module):
    """sigmoid(w · [h_i; h_j] + c), computed as sigmoid(u · h_i + v · h_j + c) with w = [u; v].

    Each half is one number per expert and token: no tensor holds all pairs of vectors.

    Args:
        dim: width D.
        init_std: standard deviation of the initial w; c starts at zero.
    """

    def __init__(self, dim: int, init_std: float) -> None:
        super().__init__()
        self.pair = Linear(2 * dim, 1, init_std, biased=True)

    def forward(self, h_TED: Tensor) -> Tensor:
        """Return the gates [T, E, E]."""
        assert self.pair.bias is not None, "built with a bias"
        halves_2D = self.pair.weight.to(h_TED.dtype).view(2, -1)
        receiver_TE, sender_TE = F.linear(h_TED, halves_2D).unbind(dim=-1)
        bias = self.pair.bias.to(h_TED.dtype)
        return torch.sigmoid(receiver_TE.unsqueeze(2) + sender_TE.unsqueeze(1) + bias)


class ScaledDot(nn.Module):
    """sigmoid(h_i · h_j / sqrt(D)): bounded, so that no message outgrows its sender."""

    def forward(self, h_TED: Tensor) -> Tensor:
        """Return the gates [T, E, E]."""
        scaled_TED = h_TED * h_TED.shape[-1] ** -0.5
        return torch.sigmoid(scaled_TED @ h_TED.transpose(1, 2))


class Cosine(nn.Module):
    """The cosine of h_i and h_j, from -1 to 1: what is opposed is subtracted."""

    def forward(self, h_TED: Tensor) -> Tensor:
        """Return the cosines [T, E, E], at least fp32."""
        return cosines(h_TED)


def cosines(h_TED: Tensor) -> Tensor:
    """Return the cosines [T, E, E] of all pairs of a token's vectors [T, E, D], at least fp32."""
    precise = torch.promote_types(h_TED.dtype, torch.float32)
    h_TED = h_TED.to(precise)
    norms_TE1 = torch.linalg.vector_norm(h_TED, dim=-1, keepdim=True)
    # Divided by infinity, not by a small number: that would be the factor of the gradient.
    unit_TED: Tensor = h_TED / norms_TE1.masked_fill(norms_TE1 < LEAST_NORM, float("inf"))
    return unit_TED @ unit_TED.transpose(1, 2)


def build_similarity(dim: int, config: GraphConfig, init_std: float) -> PairGate | ScaledDot | Cosine:
    """Return the configured similarity of vectors of width ``dim``."""
    match config.similarity:
        case "gate":
            return PairGate(dim, init_std)
        case "dot":
            return ScaledDot()
        case "cosine":
            return Cosine()
