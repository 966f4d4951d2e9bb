"""Short ways to say where public tensors lie in ours."""

from __future__ import annotations

from collections.abc import Mapping

from moe_train.interop.parts import Part


def whole(name: str, *shape: int) -> list[Part]:
    """Return the piece of a tensor that is the same on both sides."""
    return [Part(name, shape)]


def stacked(rows: Mapping[str, int], *rest: int) -> list[Part]:
    """Return the pieces of a tensor of ours whose rows are those of several public ones, one below the other.

    Args:
        rows: by public name, in our order: how many.
        rest: the other dimensions, which they share.
    """
    pieces, start = [], 0
    for name, count in rows.items():
        pieces.append(Part(name, (count, *rest), ours=(slice(start, start + count),)))
        start += count
    return pieces
