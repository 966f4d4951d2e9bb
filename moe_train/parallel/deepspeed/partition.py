"""From a run of the values of a tensor, as ZeRO cuts it, to boxes of it, as a checkpoint describes it: arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from moe_train.dist.parts import Box


def boxes_of_run(values: Tensor, start: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Yield the boxes that a run of a tensor's values is made of, in order; at most two per dimension, less one.

    Args:
        values: [N] the run: those of the tensor in row-major order, from value ``start`` on.
        start: place of the first.
        shape: of the whole tensor.

    Yields:
        Views of ``values``.
    """
    if not values.numel():
        return
    if len(shape) <= 1:
        yield Box(values.view(()) if not shape else values, (start,) if shape else ())
        return
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped:  # the rest of a row
        head = min(row - skipped, values.numel())
        yield from within(first, boxes_of_run(values[:head], skipped, shape[1:]))
        yield from boxes_of_run(values[head:], start + head, shape)
        return
    whole_rows = values.numel() // row
    if whole_rows:
        yield Box(values[: whole_rows * row].view(whole_rows, *shape[1:]), (first, *(0 for _ in shape[1:])))
    yield from within(first + whole_rows, boxes_of_run(values[whole_rows * row :], 0, shape[1:]))


def within(index: int, boxes: Iterator[Box]) -> Iterator[Box]:
    """Yield boxes of one row of a tensor as boxes of the tensor."""
    for box in boxes:
        yield Box(box.values.unsqueeze(0), (index, *box.offsets))
