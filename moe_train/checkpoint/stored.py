"""Reads boxes of tensors from a checkpoint's files: each box once, and of a large one the rows that are asked for.

torch's own reader loads the whole box of a file again for every piece of it: a rank that takes 32 scattered experts out
of a box of 256 would read 32 times 256 of them.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import torch
from torch import Tensor
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


@dataclass(frozen=True)
class Description:
    """What a box is, without its values.

    Attributes:
        shape: [N, ...]; of a scalar [].
        dtype: of the values.
        is_contiguous: whether the values lie in the file row by row.
        start_bytes: where the first value lies in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool
    start_bytes: int

    @property
    def row_bytes(self) -> int:
        """Size of one index of dimension 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class BoxReader:
    """Reads from the files of a checkpoint. Keeps what boxes look like, so that none is described twice, and no values.

    Args:
        folder: of the files.
        metadata: says where each box lies.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata
        self.places: Mapping[MetadataIndex, Place] = metadata.storage_data
        self._descriptions: dict[MetadataIndex, Description] = {}

    def read(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Fill what a planner wants, file by file and in the order of their bytes.

        Args:
            items: the wanted pieces, each of one box.
            planner: knows the tensors to fill; they get the values in their own dtype and on their own device.

        Raises:
            EOFError: a file ends within a box.
        """
        lengths = first_lengths(self.metadata, {item.storage_index.fqn for item in items})
        of_box: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in items:
            of_box[item.storage_index].append(item)
        of_file: dict[str, list[MetadataIndex]] = defaultdict(list)
        for index in sorted(of_box, key=lambda index: self.places[index].offset):
            of_file[self.places[index].relative_path].append(index)
        for name, indices in of_file.items():
            with opened(self.folder / name) as file:
                for index in indices:
                    for item, values in self.pieces(file, index, lengths[index], of_box[index]):
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(values)
                        planner.commit_tensor(item, target)

    def pieces(
        self, file: IO[bytes], index: MetadataIndex, num_rows: int, items: Sequence[ReadItem]
    ) -> Iterator[tuple[ReadItem, Tensor]]:
        """Yield the pieces of one box: of the box in memory, or row by row where fewer rows are wanted than it has."""
        wanted_rows = sum(item.lengths[0] if item.lengths else 1 for item in items)
        box = self.description(file, index) if wanted_rows < num_rows else None
        if box is None or not box.is_contiguous:
            whole = loaded(file, self.places[index])
            for item in items:
                yield item, narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
            return
        for item in items:
            values = rows(file, box, item.storage_offsets[0], item.lengths[0])
            yield item, narrow_tensor_by_index(values, [0, *item.storage_offsets[1:]], item.lengths)

    def description(self, file: IO[bytes], index: MetadataIndex) -> Description:
        """Return what a box of this file looks like; looks into the file for the first time only."""
        if index not in self._descriptions:
            self._descriptions[index] = described(file, self.places[index])
        return self._descriptions[index]


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


def described(file: IO[bytes], place: Place) -> Description:
    """Return what the box at a place looks like, without reading its values.

    Of the device "meta" and not by a FakeTensorMode, which keeps something of every tensor that it ever saw.
    """
    box = loaded(file, place, "meta")
    # torch notes there, for readers like this one, at which byte of its archive a storage begins.
    start_bytes = box.untyped_storage()._checkpoint_offset
    assert start_bytes is not None, "torch knows where the values begin that it did not read"
    start_bytes += place.offset + int(box.storage_offset()) * box.itemsize
    return Description(tuple(box.shape), box.dtype, box.is_contiguous(), start_bytes)


def loaded(file: IO[bytes], place: Place, device: str = "cpu") -> Tensor:
    """Return the box that was saved at a place; on the device "meta" it has no values, and none are read."""
    view = _create_file_view(cast(io.IOBase, file), place.offset, place.length)
    found = torch.load(cast(IO[bytes], view), map_location=device, weights_only=True)
    assert isinstance(found, Tensor), f"a box is a tensor, not a {type(found).__name__}"
    return found


def rows(file: IO[bytes], box: Description, first: int, count: int) -> Tensor:
    """Return rows ``first`` to ``first + count`` of a contiguous box, [count, ...] in its dtype, reading no others.

    Raises:
        EOFError: the file ends before.
    """
    values = torch.empty((count, *box.shape[1:]), dtype=box.dtype)
    file.seek(box.start_bytes + first * box.row_bytes)
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
