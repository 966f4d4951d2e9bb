"""Looks into a checkpoint without a run, a model or other processes: what it holds, whether it is intact, its tensors.

One tensor at a time is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moe_train.checkpoint.manifest import METADATA, TRAINER, Manifest, damage_of, read_manifest
from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.planner import PartReader
from moe_train.checkpoint.reader import CHECKPOINTS, is_checkpoint, published_steps, step_name
from moe_train.checkpoint.stored import BoxReader
from moe_train.dist.parts import Part
from moe_train.errors import CheckpointError, Problem

NUMBERED = re.compile(r"(\w+\.\d+)\.")
"""One of several alike, in the path of a tensor: a layer."""
PIECE_VALUES = 1 << 22
"""Values that are compared at once: 64 MB as two tensors of fp64."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint.

    Attributes:
        key: ``model.<path>`` or ``optim.<path>.<name of the state>``.
        shape: of the whole tensor.
        dtype: in the files.
        num_boxes: in how many pieces it was written.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_boxes: int

    @property
    def section(self) -> str:
        """``model`` or ``optim``."""
        return self.key.partition(".")[0]

    @property
    def layer(self) -> str:
        """The layer that it belongs to, as ``blocks.3``; of what is in no layer the first name."""
        path = self.key.partition(".")[2]
        found = NUMBERED.match(path)
        return found[1] if found else path.partition(".")[0]

    @property
    def num_values(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()

    @property
    def size_bytes(self) -> int:
        """Size of its values."""
        return self.num_values * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A checkpoint on the disk, damaged or not.

    Attributes:
        path: its folder.
        manifest: None when it cannot be read.
        damages: what is wrong with its files; empty when it is intact.
        trainer: what the trainer gave, its position in the run; empty when it cannot be read.
        metadata: where its tensors lie; None when it cannot be read.
    """

    path: Path
    manifest: Manifest | None
    damages: tuple[Problem, ...]
    trainer: dict[str, Any]
    metadata: Metadata | None

    @property
    def tensors(self) -> list[TensorInfo]:
        """Its tensors by key; none when it cannot be read."""
        entries = self.metadata.state_dict_metadata if self.metadata else {}
        return [
            TensorInfo(key, tuple(entry.size), entry.properties.dtype, len(entry.chunks))
            for key, entry in sorted(entries.items())
            if isinstance(entry, TensorStorageMetadata)
        ]

    def read(self, tensor: TensorInfo) -> Tensor:
        """Return a whole tensor, from all the files that hold something of it."""
        assert self.metadata is not None, "it has tensors, so it could be read"
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        planner = PartReader()
        planner.set_up_planner({tensor.key: Part.whole(values)}, self.metadata, is_coordinator=True)
        BoxReader(self.path, self.metadata).read(planner.create_local_plan().items, planner)
        return values


def look_at(folder: Path) -> Stored:
    """Return what a checkpoint holds and which of its files are damaged, all of them verified."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Stored(folder, None, error.problems, {}, None)
    found = {name: damage_of(folder / name, record) for name, record in manifest.files.items()}
    damages = [damage for damage in found.values() if damage is not None]
    trainer: dict[str, Any] = {}
    if found[TRAINER] is None:
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    metadata = None
    if found[METADATA] is None:
        try:
            metadata = read_metadata(folder, manifest)
        except CheckpointError as error:
            damages += error.problems
    return Stored(folder, manifest, tuple(damages), trainer, metadata)


def intact(folder: Path) -> Stored:
    """Return a checkpoint of which every file is what its manifest says.

    Raises:
        CheckpointError: lists everything that is damaged.
    """
    stored = look_at(folder)
    if stored.damages:
        raise CheckpointError(stored.damages)
    return stored


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint that ``path`` is, or all those of the run that it is, oldest first.

    Raises:
        CheckpointError: it is neither.
    """
    if is_checkpoint(path):
        return [path]
    for folder in (path / CHECKPOINTS, path):
        steps = published_steps(folder)
        if steps:
            return [folder / step_name(step) for step in steps]
    remedy = f"give the folder of a checkpoint ({step_name(100)}) or of a run with checkpoints"
    raise CheckpointError(Problem(str(path), None, "holds no checkpoint", remedy))


@dataclass(frozen=True)
class Difference:
    """How a tensor differs between two checkpoints.

    Attributes:
        key: of the tensor.
        rule: in words.
        largest: absolute difference of two values; infinite where only one is a number, None where shapes differ.
    """

    key: str
    rule: str
    largest: float | None


def differences_of(a: Stored, b: Stored) -> Iterator[Difference]:
    """Yield the tensors of which two checkpoints do not hold the same, by key. Number formats may differ."""
    ours, theirs = ({tensor.key: tensor for tensor in stored.tensors} for stored in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs:
            yield Difference(key, f"is in {(a if key in ours else b).path} only", None)
        elif ours[key].shape != theirs[key].shape:
            yield Difference(key, f"has shape {ours[key].shape} and {theirs[key].shape}", None)
        elif largest := largest_difference(a.read(ours[key]), b.read(theirs[key])):
            yield Difference(key, f"differs by up to {largest:.3e}", largest)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape; what is no number equals its like alone."""
    flat_a, flat_b = a.flatten(), b.flatten()
    largest = 0.0
    for start in range(0, len(flat_a), PIECE_VALUES):
        x, y = (flat[start : start + PIECE_VALUES].double() for flat in (flat_a, flat_b))
        is_same = (x == y) | (x.isnan() & y.isnan())
        apart = (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(is_same, 0.0)
        largest = max(largest, apart.max().item())
    return largest
