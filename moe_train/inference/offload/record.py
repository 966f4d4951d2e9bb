"""One expert as one safetensors file, written tensor by tensor and read by mapping it.

The format is written here and not by the safetensors library, which wants all tensors of a file in memory at once, and
maps files privately and writable, which counts as memory of the process
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_train.errors import DataError, Problem

FORMAT_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
ALIGNMENT = 64
"""Headers are padded to a multiple of this, in bytes: values then lie as well as in memory of their own."""
PARTIAL = ".partial"
"""Ends the name of a file that is being written."""
ANEW = "run it again: what does not fit is written anew"


@dataclass(frozen=True)
class Form:
    """What the records of one layer look like.

    Attributes:
        layer: name of the module with the experts: ``blocks.3.ffn.experts``.
        tensors: name and shape of each of an expert's tensors, in order of the file.
        num_experts: E over all ranks.
        dtype: of the values.
        identity: of the checkpoint that they come from.
    """

    layer: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    num_experts: int
    dtype: torch.dtype
    identity: str

    @cached_property
    def sizes_bytes(self) -> tuple[int, ...]:
        """Size of each tensor."""
        return tuple(int(np.prod(shape)) * self.dtype.itemsize for _, shape in self.tensors)

    @property
    def values_bytes(self) -> int:
        """Size of one expert."""
        return sum(self.sizes_bytes)

    def name(self, expert: int) -> str:
        """Return where an expert's record lies in the folder."""
        return f"{self.layer}/{expert:05d}.safetensors"

    def header(self, expert: int) -> bytes:
        """Return what an expert's record begins with: no other expert's does, and no other checkpoint's."""
        table: dict[str, object] = {"__metadata__": {"format": "pt", "checkpoint": self.identity}}
        end = 0
        for (name, shape), size_bytes in zip(self.tensors, self.sizes_bytes, strict=True):
            start, end = end, end + size_bytes
            places = {"shape": list(shape), "data_offsets": [start, end]}
            table[f"{self.layer}.{name}.{expert}"] = {"dtype": FORMAT_NAMES[self.dtype], **places}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def empty(self, device: torch.device) -> list[Tensor]:
        """Return memory for one expert, without values."""
        return [torch.empty(shape, dtype=self.dtype, device=device) for _, shape in self.tensors]


def write_record(folder: Path, form: Form, expert: int, read: Callable[[str], Tensor]) -> None:
    """Write a record: it is there whole or not at all. One tensor is in memory at a time.

    Args:
        folder: of all records; that of the layer is made.
        form: of the layer.
        expert: global index.
        read: returns a tensor of this expert by its name, on the CPU in the form's dtype.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path = folder / form.name(expert)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(form.header(expert))
        for name, _ in form.tensors:
            file.write(as_bytes(read(name)).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def is_intact(folder: Path, form: Form, expert: int) -> bool:
    """Whether a record has the size and the header that it must have. Does not read the values."""
    path, header = folder / form.name(expert), form.header(expert)
    try:
        if path.stat().st_size != len(header) + form.values_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def read_record(folder: Path, form: Form, expert: int, into: Sequence[Tensor]) -> None:
    """Copy an expert's values into memory, through a read-only map of its file.

    Args:
        folder: of all records.
        form: of the layer.
        expert: global index.
        into: as `Form.empty` makes it.

    Raises:
        DataError: the record is gone, cut off, or no longer that of this checkpoint.
    """
    path, header = folder / form.name(expert), form.header(expert)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != len(header) + form.values_bytes:
                raise DataError(Problem(str(path), None, "is cut off, or of another model", ANEW))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                _copy_mapped(mapped, header, path, into)
    except OSError as error:
        raise DataError(Problem(str(path), None, error.strerror or str(error), ANEW)) from error


def _copy_mapped(mapped: mmap.mmap, header: bytes, path: Path, into: Sequence[Tensor]) -> None:
    if mapped[: len(header)] != header:
        rule = "was written anew from another checkpoint while it was in use"
        raise DataError(Problem(str(path), None, rule, "give each run its own inference.offload.folder"))
    mapped.madvise(mmap.MADV_WILLNEED)  # one long read, not a wait for each page
    start = len(header)
    for target in into:
        size_bytes = target.numel() * target.itemsize
        # A tensor over a read-only map would be one that must not be written; numpy knows such arrays.
        values = np.frombuffer(mapped, np.uint8, size_bytes, start)
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        np.copyto(as_bytes(host), values)
        if host is not target:
            target.copy_(host)
        del values  # else the map could not be closed
        start += size_bytes


def as_bytes(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the memory of a contiguous tensor on the CPU."""
    assert values.is_contiguous(), "bytes follow each other"
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = values.flatten().view(torch.uint8).numpy()
    return found
