"""A model written as safetensors files by the ranks that hold it, one tensor at a time.

The file format is written here and not by the safetensors library, which wants all tensors of a file in memory at once:
8 bytes with the length of a JSON header, the header, the values in its order
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint.agreement import on_leader, together
from moe_train.checkpoint.files import write_synced
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.interop.load import Expected
from moe_train.interop.pieces import Held, into_public
from moe_train.interop.plan import ALWAYS_FP32, Planned, PlannedFile, plan_files
from moe_train.interop.shards import INDEX

FORMAT_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
"""The header is padded to a multiple of this, in bytes."""


@dataclass(frozen=True)
class Written:
    """What a model has become.

    Attributes:
        files: names of the safetensors files.
        total_bytes: size of all tensors.
    """

    files: tuple[str, ...]
    total_bytes: int


@torch.no_grad()
def write(
    held: Held,
    table: Expected,
    folder: Path,
    mesh: Mesh,
    world: World,
    dtype: torch.dtype,
    shard_bytes: int,
) -> Written:
    """Write this rank's share of a model into an existing folder. Collective.

    An expert's tensors are written by the rank of the first replica that holds it, all others by rank 0. A rank holds
    one public tensor beside the model.

    Args:
        held: this rank's tensors.
        table: where our tensors lie in a public folder, and public tensors that our model has no place for.
        folder: exists, on a disk that all ranks share.
        mesh: the layout.
        world: the processes.
        dtype: of the weights; integers keep theirs, and `ALWAYS_FP32` is fp32.
        shard_bytes: largest size of a file.

    Raises:
        CheckpointError: on all ranks, when one could not write; the folder is then unfinished.
    """
    parts = [(name, part) for name, parts in table.parts.items() for part in parts]
    dtypes = {part.name: _file_dtype(part.name, held.tensors[name], dtype) for name, part in parts}
    dtypes |= dict.fromkeys(table.constants, dtype)
    files = plan_files(table.parts, table.constants, held.sharded, mesh.layout.ep, dtypes, shard_bytes)
    own = [[file for file in files if not file.is_pooled and file.writer == rank] for rank in range(world.size)]
    # In rounds of one file: no rank is ever ahead of another by more than a collective may last.
    for turn in range(max(map(len, own))):
        mine = own[world.rank][turn : turn + 1]
        together(world, "writing weights", partial(_write_own, folder, mine, held))
    for file in files:
        if file.is_pooled:
            together(world, "writing weights", partial(_write_pooled, folder / file.name, file, held, mesh))
    written = Written(tuple(file.name for file in files), sum(t.size_bytes for file in files for t in file.tensors))
    on_leader(world, "writing the index", lambda: _write_index(folder, files, written))
    return written


def _file_dtype(name: str, ours: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not ours.is_floating_point():
        return ours.dtype
    return torch.float32 if name.endswith(ALWAYS_FP32) else dtype


def _write_own(folder: Path, files: Sequence[PlannedFile], held: Held) -> None:
    """Write files of which this rank holds everything."""
    for file in files:
        with _opened(folder / file.name, file.tensors) as add:
            for planned in file.tensors:
                add(_assembled(planned, held, has_dense=True))


def _write_pooled(path: Path, file: PlannedFile, held: Held, mesh: Mesh) -> None:
    """Bring each tensor of a file together on rank 0, which writes it; nothing on the ranks of other replicas."""
    if mesh.rank >= mesh.layout.ep:
        return
    if mesh.rank > 0:
        for planned in file.tensors:
            _pool(_assembled(planned, held, has_dense=False), mesh)
        return
    failure: OSError | None = None
    remaining = list(file.tensors)
    try:
        with _opened(path, file.tensors) as add:
            while remaining:
                whole = _assembled(remaining.pop(0), held, has_dense=True)
                _pool(whole, mesh)
                add(whole)
    except OSError as error:
        failure = error
        for planned in remaining:  # the others are on their way to these sums
            _pool(_assembled(planned, held, has_dense=True), mesh)
    if failure is not None:
        raise failure


def _pool(public: Tensor, mesh: Mesh) -> None:
    """Add up what the ranks of the EP group have of a tensor, on rank 0.

    Each value is zero on all ranks but one. Bytes are added, not numbers: a sum would make +0 of -0.
    """
    dist.reduce(public.flatten().view(torch.uint8), dst=0, group=mesh.ep)


def _assembled(planned: Planned, held: Held, has_dense: bool) -> Tensor:
    """Return a public tensor on the CPU, with zeros in the place of what other ranks hold.

    Args:
        planned: the tensor.
        held: this rank's tensors.
        has_dense: whether what all ranks hold goes in.
    """
    public = torch.full(planned.shape, planned.constant, dtype=planned.dtype)
    for name, part in planned.pieces:
        ours = held.view(name, part) if has_dense or name in held.sharded else None
        if ours is not None:
            into_public(public, part, ours)
    return public


@contextmanager
def _opened(path: Path, tensors: Sequence[Planned]) -> Iterator[Callable[[Tensor], None]]:
    """Write the header of a file; yields what appends the next tensor's values."""
    with path.open("wb") as file:
        file.write(header(tensors))
        yield lambda tensor: _append(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def _append(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.flatten().view(torch.uint8).numpy().data)


def header(tensors: Sequence[Planned]) -> bytes:
    """Return what a safetensors file begins with."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes
        places = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        table[tensor.name] = {"dtype": FORMAT_NAMES[tensor.dtype], **places}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_index(folder: Path, files: Sequence[PlannedFile], written: Written) -> None:
    """Write the table from tensors to files; a model in one file has none."""
    if len(files) == 1:
        return
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    content = {"metadata": {"total_size": written.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_synced(folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())
