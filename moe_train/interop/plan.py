"""Which public tensor goes into which file, written by which rank: arithmetic that every rank does alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from moe_train.interop.load import Constants
from moe_train.interop.parts import Part, Parts
from moe_train.interop.pieces import by_public_name, size_at
from moe_train.interop.shards import SINGLE

ALWAYS_FP32 = ("e_score_correction_bias", "router.bias_E", "router.threshold_E")
"""Ends of names that stay in fp32: the steps of loss-free balancing are smaller than a bf16 rounding, and transformers
keeps them so (_keep_in_fp32_modules_strict)."""


@dataclass(frozen=True)
class Planned:
    """One public tensor that will be written.

    Attributes:
        name: public name.
        shape: of the whole tensor.
        dtype: in the file.
        pieces: our names and parts that it is made of; none for a constant.
        constant: value of all entries when no piece gives them.
        writer: rank that writes it, below the EP size: a rank of the first replica.
        is_pooled: whether several ranks hold pieces of it: they are brought together on the writer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[str, Part], ...]
    constant: float
    writer: int
    is_pooled: bool

    @property
    def size_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file.

    Attributes:
        name: in the folder.
        tensors: in the order in which they lie in it.
    """

    name: str
    tensors: tuple[Planned, ...]

    @property
    def writer(self) -> int:
        """The rank that writes it."""
        return self.tensors[0].writer

    @property
    def is_pooled(self) -> bool:
        """Whether all ranks of the first replica take part."""
        return self.tensors[0].is_pooled


def plan_files(
    parts: Parts,
    constants: Constants,
    sharded: Collection[str],
    ep: int,
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
) -> tuple[PlannedFile, ...]:
    """Return the files of a model.

    Args:
        parts: the table of the family.
        constants: public tensors that our model has no place for.
        sharded: names of our tensors whose experts are spread over the ranks.
        ep: expert-parallel size; divides the experts of each of them.
        dtypes: number format of each public tensor in the files, by its name.
        shard_bytes: largest size of the tensors of a file; one larger tensor has a file of its own.
    """
    counts = {name: 1 + max(part.expert or 0 for part in parts[name]) for name in sharded}
    home = {name: max(1, count // ep) for name, count in counts.items()}
    tensors = [_planned(name, pieces, home, dtypes[name]) for name, pieces in by_public_name(parts).items()]
    for name, (shape, value) in constants.items():
        tensors.append(Planned(name, tuple(shape), dtypes[name], (), value, 0, False))
    groups: dict[tuple[bool, int], list[Planned]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.is_pooled, tensor.writer), []).append(tensor)
    files = [PlannedFile("", file) for key in sorted(groups) for file in _packed(groups[key], shard_bytes)]
    if len(files) == 1:
        return (replace(files[0], name=SINGLE),)
    names = (f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1))
    return tuple(replace(file, name=name) for file, name in zip(files, names, strict=True))


def _planned(name: str, pieces: list[tuple[str, Part]], home: dict[str, int], dtype: torch.dtype) -> Planned:
    """Plan one tensor.

    Args:
        name: public name.
        pieces: our names and parts.
        home: experts per rank, by our names of the sharded tensors.
        dtype: in the file.
    """
    shape = tuple(pieces[0][1].shape)
    assert all(tuple(part.shape) == shape for _, part in pieces), f"the parts of {name} disagree about its shape"
    given = sum(size_at(shape, part.theirs) for _, part in pieces)
    assert given == math.prod(shape), f"parts give {given} of the {math.prod(shape)} values of {name}"
    holders = {(part.expert or 0) // home[ours] if ours in home else 0 for ours, part in pieces}
    is_pooled = len(holders) > 1
    return Planned(name, shape, dtype, tuple(pieces), 0.0, 0 if is_pooled else holders.pop(), is_pooled)


def _packed(tensors: Iterable[Planned], shard_bytes: int) -> list[tuple[Planned, ...]]:
    """Split tensors into files, in order."""
    files: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.size_bytes > room:
            files.append([])
            room = shard_bytes
        files[-1].append(tensor)
        room -= tensor.size_bytes
    # Values of 4 bytes first: whatever follows, each tensor is then aligned to its own number format.
    return [tuple(sorted(file, key=lambda tensor: -tensor.dtype.itemsize)) for file in files]
