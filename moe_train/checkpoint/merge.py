"""Writes the whole tensors of a checkpoint as safetensors files, one tensor in memory at a time.

The file format is written here and not by the safetensors library, which wants all tensors of a file at once: 8 bytes
with the length of a JSON header, the header, the values in its order
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moe_train.checkpoint.files import sync_folder, write_synced
from moe_train.checkpoint.whole import Stored, TensorInfo
from moe_train.errors import CheckpointError, Problem

FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
"""The header is padded to a multiple of this, in bytes."""
WEIGHTS = "model."
INDEX = "model.safetensors.index.json"
"""Table from tensors to files, where there are several."""


def merge(stored: Stored, output: Path, with_optimizer: bool, file_bytes: int | None) -> list[Path]:
    """Write the tensors of a checkpoint, whole.

    Weights have the names of the model's parameters and buffers, without ``model.``; moments keep ``optim.``.

    Args:
        stored: an intact checkpoint.
        output: file to write; with ``file_bytes`` the folder of several.
        with_optimizer: whether the optimizer's state is written too.
        file_bytes: largest size of the tensors of a file; one larger tensor has a file of its own. None: one file.

    Returns:
        The files.

    Raises:
        CheckpointError: the output exists, or a number format has no name in such files.
    """
    tensors = [tensor for tensor in stored.tensors if with_optimizer or tensor.key.startswith(WEIGHTS)]
    problems = [
        Problem(tensor.key, None, f"is of {tensor.dtype}, which safetensors files cannot hold", "leave it out")
        for tensor in tensors
        if tensor.dtype not in FORMAT_NAMES
    ]
    if output.exists():
        problems.append(Problem(str(output), None, "exists", "name another output, or delete it"))
    if problems:
        raise CheckpointError(problems)
    if file_bytes is None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(stored, tensors, output)
        return [output]
    return write_files(stored, packed(tensors, file_bytes), output)


def write_files(stored: Stored, groups: Sequence[Sequence[TensorInfo]], folder: Path) -> list[Path]:
    """Write several files and the table of what is in which."""
    folder.mkdir(parents=True)
    paths = [folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for path, group in zip(paths, groups, strict=True):
        write_file(stored, group, path)
    weight_map = {public_name(tensor): path.name for path, group in zip(paths, groups, strict=True) for tensor in group}
    total_bytes = sum(tensor.size_bytes for group in groups for tensor in group)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_synced(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return paths


def write_file(stored: Stored, tensors: Sequence[TensorInfo], path: Path) -> None:
    """Write one file; it has its name when it is complete."""
    unfinished = path.with_name(f".{path.name}.part")
    assert stored.manifest is not None, "a damaged checkpoint has no tensors to write"
    try:
        with unfinished.open("wb") as file:
            file.write(header(tensors, {"step": str(stored.manifest.step)}))
            for tensor in tensors:
                file.write(stored.read(tensor).view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def header(tensors: Sequence[TensorInfo], notes: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes
        places = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        table[public_name(tensor)] = {"dtype": FORMAT_NAMES[tensor.dtype], **places}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def packed(tensors: Sequence[TensorInfo], file_bytes: int) -> list[list[TensorInfo]]:
    """Return the tensors of each file, in their order."""
    groups: list[list[TensorInfo]] = [[]]
    used_bytes = 0
    for tensor in tensors:
        if groups[-1] and used_bytes + tensor.size_bytes > file_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(tensor)
        used_bytes += tensor.size_bytes
    return groups


def public_name(tensor: TensorInfo) -> str:
    """Return the name of a tensor in the file."""
    return tensor.key.removeprefix(WEIGHTS)
