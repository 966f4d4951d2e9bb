"""Reads boxes of tensors from a checkpoint's files: each box once, and of a large one the rows that are asked for.

torch's own reader loads the whole box of a file again for every piece of it: a rank that takes 32 scattered experts out
of a box of 256 would read 32 times 256 of them.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view


class Place(Protocol):
    """Where a box lies, as torch notes it.

    Attributes:
        relative_path: name of the file.
        offset: first byte there.
        length: bytes.
    """

    relative_path: str
    offset: int
    length: int


def read_pieces(folder: Path, metadata: Metadata, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
    """Fill what a planner wants from the files of a checkpoint, file by file and in the order of their bytes.

    Args:
        folder: of the files.
        metadata: says where each box lies.
        items: the wanted pieces, each of one box.
        planner: knows the tensors to fill; they get the values in their own dtype and on their own device.
    """
    places: Mapping[MetadataIndex, Place] = metadata.storage_data
    lengths = first_lengths(metadata, {item.storage_index.fqn for item in items})
    of_box: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
    for item in items:
        of_box[item.storage_index].append(item)
    of_file: dict[str, list[MetadataIndex]] = defaultdict(list)
    for index in sorted(of_box, key=lambda index: places[index].offset):
        of_file[places[index].relative_path].append(index)
    for name, indices in of_file.items():
        with opened(folder / name) as file:
            for index in indices:
                for item, values in pieces(file, places[index], lengths[index], of_box[index]):
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(values)
                    planner.commit_tensor(item, target)


def opened(path: Path) -> IO[bytes]:
    """Return a file to read: a function of its own, so that a test can count what is read."""
    return path.open("rb")


def first_lengths(metadata: Metadata, keys: Iterable[str]) -> dict[MetadataIndex, int]:
    """Return the length of dimension 0 of each box of some tensors; of a scalar 1."""
    entries = {key: metadata.state_dict_metadata[key] for key in keys}
    return {
        MetadataIndex(key, chunk.offsets): chunk.sizes[0] if chunk.sizes else 1
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }


def pieces(
    file: IO[bytes], place: Place, num_rows: int, items: Sequence[ReadItem]
) -> Iterator[tuple[ReadItem, Tensor]]:
    """Yield the pieces of one box: of the box in memory, or row by row where fewer rows are wanted than it has."""
    wanted_rows = sum(item.lengths[0] if item.lengths else 1 for item in items)
    box = described(file, place) if wanted_rows < num_rows else None
    if box is None or not box.is_contiguous():
        whole = loaded(file, place)
        for item in items:
            yield item, narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
        return
    for item in items:
        values = rows(file, place, box, item.storage_offsets[0], item.lengths[0])
        yield item, narrow_tensor_by_index(values, [0, *item.storage_offsets[1:]], item.lengths)


def described(file: IO[bytes], place: Place) -> Tensor:
    """Return a box without its values: shape, strides and dtype, and where the values begin."""
    with FakeTensorMode():
        return loaded(file, place)


def loaded(file: IO[bytes], place: Place) -> Tensor:
    """Return the box that was saved at a place."""
    view = _create_file_view(cast(io.IOBase, file), place.offset, place.length)
    found = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
    assert isinstance(found, Tensor), f"a box is a tensor, not a {type(found).__name__}"
    return found


def rows(file: IO[bytes], place: Place, box: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` rows of dimension 0 of a contiguous box, reading no others.

    Args:
        file: that holds it.
        place: where.
        box: its description (`described`), [N, ...].
        first: of the rows.
        count: of the rows.
    """
    values = torch.empty((count, *box.shape[1:]), dtype=box.dtype)
    # torch notes there, for readers like this one, at which byte of its archive a storage begins.
    start = box.untyped_storage()._checkpoint_offset
    assert start is not None, "a description knows where its values begin"
    skipped_values = int(box.storage_offset()) + first * math.prod(box.shape[1:])
    file.seek(place.offset + start + skipped_values * box.itemsize)
    read_into(file, values.view(-1).view(torch.uint8).numpy().data)
    return values


def read_into(file: IO[bytes], wanted: memoryview) -> None:
    """Fill a buffer; a file may give less than it is asked for, but not nothing.

    Raises:
        EOFError: the file ends before.
    """
    while wanted.nbytes:
        got: int = file.readinto(wanted)  # type: ignore[attr-defined]
        if not got:
            raise EOFError(f"{getattr(file, 'name', 'a file')} ends within a tensor")
        wanted = wanted[got:]
