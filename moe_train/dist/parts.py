"""What a rank holds of tensors that belong to no layout: boxes of them, each with its place in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Box:
    """A box of a tensor, on this rank.

    Attributes:
        values: its values; a view of what the rank holds, so that filling it fills that.
        offsets: place of its first value in the whole tensor, one number per dimension.
    """

    values: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        boxes: disjoint, none empty; no boxes at all where a rank holds nothing of it.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @staticmethod
    def whole(values: Tensor) -> Part:
        """Return the part of a rank that holds everything, as all others do."""
        return Part(tuple(values.shape), boxes_of(values, (0,) * values.dim()))

    @staticmethod
    def of(values: Tensor) -> Part:
        """Return the part that a tensor is, which may be sharded over a mesh of ranks."""
        if not isinstance(values, DTensor):
            return Part.whole(values.detach())
        local: Tensor = values.to_local()
        return Part(tuple(values.shape), boxes_of(local.detach(), local_offsets(values)))

    @staticmethod
    def of_experts(values: Tensor, experts: Sequence[int], num_experts: int) -> Part:
        """Return the part that a rank's experts are of those of all ranks.

        Args:
            values: [L, ...] of the experts held here, in order of places; may in turn be sharded over ranks that hold
                the same experts, along any dimension.
            experts: their L global indices; the places of a rank need not be in order of indices.
            num_experts: experts E over all ranks.

        Returns:
            A part of [E, ...], of one box for each run of consecutive indices.
        """
        assert len(experts) == values.shape[0], f"{values.shape[0]} experts are not those {len(experts)}"
        own = Part.of(values)
        boxes = (moved for box in own.boxes for moved in by_expert(box, experts))
        return Part((num_experts, *own.shape[1:]), tuple(boxes))


def by_expert(box: Box, experts: Sequence[int]) -> Iterator[Box]:
    """Cut a box along dimension 0, places of a rank's experts, so that each piece is a box of the experts of all."""
    first, length = box.offsets[0], box.values.shape[0]
    held = experts[first : first + length]
    start = 0
    for place in range(1, length + 1):
        if place == length or held[place] != held[place - 1] + 1:
            yield Box(box.values[start:place], (held[start], *box.offsets[1:]))
            start = place


def boxes_of(values: Tensor, offsets: tuple[int, ...]) -> tuple[Box, ...]:
    """Return the one box of these values, or none where a rank got nothing."""
    return (Box(values, offsets),) if values.numel() else ()


def local_offsets(values: DTensor) -> tuple[int, ...]:
    """Return the place of this rank's shard in a sharded tensor."""
    _, offsets = compute_local_shape_and_global_offset(values.shape, values.device_mesh, values.placements)
    return tuple(offsets)
