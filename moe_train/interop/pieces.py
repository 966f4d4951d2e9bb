"""One `Part` applied in both directions: from a public folder to our tensor, and from our tensor to a public one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from moe_train.interop.folder import PublicFolder
from moe_train.interop.parts import Index, Part, Parts
from moe_train.moe.roles import Kind, roles_of


@dataclass(frozen=True)
class Held:
    """What one rank has of a model.

    Attributes:
        tensors: parameters and buffers by name; any dtype and device.
        sharded: names of those [L, ...] whose dimension 0 runs over this rank's experts. All other tensors are equal
            on all ranks.
        experts: global indices of these experts.
        others: the same by name, where a layer of another kind has experts of its own number.
    """

    tensors: Mapping[str, Tensor]
    sharded: Collection[str]
    experts: Sequence[int]
    others: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def view(self, name: str, part: Part) -> Tensor | None:
        """Return the place of a part in our tensor, sharing its memory; None when its expert is on another rank."""
        if name not in self.sharded:
            return self.tensors[name][part.ours]
        assert part.expert is not None, f"a part of {name} does not say which expert it belongs to"
        experts = self.others.get(name, self.experts)
        if part.expert not in experts:
            return None
        return self.tensors[name][(experts.index(part.expert), *part.ours[1:])]


def held_of(model: nn.Module) -> Held:
    """Return what this rank has of a model; the tensors share memory with it."""
    roles = {name: role for name, role in roles_of(model).items() if role.kind is Kind.EXPERT}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    experts = next((role.experts for role in roles.values()), range(0))
    others = {name: role.experts for name, role in roles.items() if role.experts != experts}
    return Held(tensors, frozenset(roles), experts, others)


def from_public(folder: PublicFolder, part: Part) -> Tensor:
    """Return ``turn(P[theirs])`` of a part, on the CPU in the stored dtype: ours without the factor."""
    first: int | slice = part.theirs[0] if part.theirs else slice(None)
    piece = folder.read(part.name, first)
    rest = part.theirs[1:] if isinstance(first, int) else (slice(None), *part.theirs[1:])
    piece = piece[rest] if piece.dim() else piece
    if part.rows is not None:
        piece = piece[part.rows]
    return piece.transpose(-1, -2) if part.transposed else piece


def into_public(public: Tensor, part: Part, ours: Tensor) -> None:
    """Write one of our pieces to its place in a public tensor: the inverse of `from_public` and of the factor.

    Args:
        public: the whole public tensor, on the CPU; changed in place.
        part: where the piece goes.
        ours: the piece, in any dtype and on any device.
    """
    piece = ours.transpose(-1, -2) if part.transposed else ours
    if part.factor != 1.0:
        piece = piece / part.factor
    place = public[part.theirs]
    assert place.shape == piece.shape, f"{part.name} takes {list(place.shape)}, not {list(piece.shape)}"
    if part.rows is None:
        place.copy_(piece)
    else:
        place[part.rows] = piece.to(place.device, place.dtype)


def size_at(shape: tuple[int, ...], index: Index) -> int:
    """Return the number of values of ``tensor[index]`` for a tensor of this shape."""
    kept = [
        len(range(size)[where]) if isinstance(where, slice) else 1
        for size, where in zip(shape, (*index, *[slice(None)] * (len(shape) - len(index))), strict=True)
    ]
    return math.prod(kept)


def whole_shape(name: str, local: tuple[int, ...], sharded: Collection[str], parts: Iterable[Part]) -> tuple[int, ...]:
    """Return the shape of our tensor over all ranks."""
    if name not in sharded:
        return local
    experts = {part.expert for part in parts}
    assert experts == set(range(len(experts))), f"the parts of {name} are of experts {experts}"
    return (len(experts), *local[1:])


def require_cover(name: str, shape: tuple[int, ...], parts: Iterable[Part]) -> None:
    """Check that the parts that are read fill our whole tensor: what no part fills would keep random values."""
    filled = sum(size_at(shape, part.ours) for part in parts if not part.copy)
    assert filled == math.prod(shape), f"parts fill {filled} of the {math.prod(shape)} values of {name}"


def by_public_name(parts: Parts) -> dict[str, list[tuple[str, Part]]]:
    """Return the parts of each public tensor with the name of our tensor, in the order of the table."""
    found: dict[str, list[tuple[str, Part]]] = {}
    for name, pieces in parts.items():
        for part in pieces:
            found.setdefault(part.name, []).append((name, part))
    return found
