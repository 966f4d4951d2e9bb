"""The law of scaling: the loss from size, tokens, experts and granularity.

    L(N, D, E, G) = c + A · (N/N₀)^-α · E^-(μ + γ ln(G/G₀)) + B · (D/D₀)^-β · E^ω

Without experts (E = 1) it is that of Hoffmann et al. (arXiv 2203.15556, eq. 2). Experts divide the term of the size by
a power of E, as in Clark et al. (arXiv 2202.01169), and multiply that of the tokens by one: more weights need more text
(as in the joint law of Ludziejewski et al., arXiv 2502.05172, whose exponents α and β change with E; here they do not).
Granularity acts through a power of G (Krajewski et al., arXiv 2402.07871, without its constant a), and only
where there are experts to choose from: its exponent is γ ln E, which is zero in a dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_train.observe.study.scaling.points import Point

Array = NDArray[np.float64]
FORMULA = "L = c + A (N/N0)^-alpha E^-(mu + gamma ln(G/G0)) + B (D/D0)^-beta E^omega"
"""The law for people and programs that read no Greek."""
CONSTANTS = ("c", "A", "alpha", "mu", "gamma", "B", "beta", "omega")
"""In the order of a law's vector; c, A and B are losses in nats per token."""
OF_SIZE, OF_TOKENS = slice(1, 5), slice(5, 8)
"""Places of the constants of the two terms."""


@dataclass(frozen=True)
class Scales:
    """Where the terms of a law have the sizes A and B: in the middle of the points, so that its constants are readable.

    Attributes:
        parameters: N₀.
        tokens: D₀.
        granularity: G₀.
    """

    parameters: float
    tokens: float
    granularity: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Scales:
        """Return the geometric means of N and D, and the coarsest granularity."""
        sizes, tokens = ([getattr(point, name) for point in points] for name in ("active_parameters", "tokens"))
        granularity = min((point.granularity for point in points if point.experts), default=1)
        return cls(float(np.exp(np.mean(np.log(sizes)))), float(np.exp(np.mean(np.log(tokens)))), float(granularity))


@dataclass(frozen=True)
class Places:
    """Where a loss is asked for: arrays of equal shape, or of shapes that broadcast.

    Attributes:
        parameters: N.
        tokens: D.
        expansion: E.
        granularity: G.
    """

    parameters: Array
    tokens: Array
    expansion: Array = field(default_factory=lambda: np.ones(()))
    granularity: Array = field(default_factory=lambda: np.ones(()))

    @classmethod
    def of(cls, points: Sequence[Point]) -> Places:
        """Return the places of points: shape (P,)."""
        names = ("active_parameters", "tokens", "expansion", "granularity")
        return cls(*(np.array([getattr(point, name) for point in points], dtype=np.float64) for name in names))

    def columns(self, scales: Scales) -> tuple[list[Array], list[Array]]:
        """Return what the constants of the term of the size (log A to γ) are multiplied with, then of the tokens."""
        experts = np.log(self.expansion)
        finer = experts * np.log(self.granularity / scales.granularity)
        size, tokens = np.log(self.parameters / scales.parameters), np.log(self.tokens / scales.tokens)
        return [np.ones_like(size), -size, -experts, -finer], [np.ones_like(tokens), -tokens, experts]


@dataclass(frozen=True)
class Law:
    """A law with its constants.

    Attributes:
        vector: float64 (8,) in the order of CONSTANTS, A and B as logarithms.
        scales: N₀, D₀ and G₀.
    """

    vector: Array
    scales: Scales

    @property
    def constants(self) -> dict[str, float]:
        """The constants by name, A and B in nats per token."""
        return dict(zip(CONSTANTS, readable(self.vector).tolist(), strict=True))

    def loss(self, places: Places) -> Array:
        """Return the losses at some places, in nats per token."""
        size, tokens = self.terms(places)
        return np.asarray(self.vector[0] + size + tokens)

    def terms(self, places: Places) -> tuple[Array, Array]:
        """Return the term of the size and that of the tokens, in nats per token."""
        of_size, of_tokens = places.columns(self.scales)
        return power(self.vector[OF_SIZE], of_size), power(self.vector[OF_TOKENS], of_tokens)

    def slopes(self, places: Places) -> Array:
        """Return the derivatives of the losses at P places by the constants (A and B: by their logarithms), (P, 8)."""
        of_size, of_tokens = places.columns(self.scales)
        size, tokens = self.terms(places)
        return np.stack(
            [np.ones_like(size), *(size * column for column in of_size), *(tokens * column for column in of_tokens)],
            axis=-1,
        )


def power(constants: Array, columns: Sequence[Array]) -> Array:
    """Return a product of powers: exp of the sum of constants times logarithms."""
    summed = sum(constant * column for constant, column in zip(constants, columns, strict=True))
    return np.asarray(np.exp(summed), dtype=np.float64)


def readable(vectors: Array) -> Array:
    """Return vectors of constants (..., 8) with A and B themselves for their logarithms."""
    shown = vectors.copy()
    for name in ("A", "B"):
        shown[..., CONSTANTS.index(name)] = np.exp(vectors[..., CONSTANTS.index(name)])
    return shown
