"""Reads the ``.metadata`` of torch.distributed.checkpoint, a pickle, without running what a stranger put into it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from moe_train.checkpoint.manifest import METADATA, OLDER_OR_COPY, Manifest
from moe_train.checkpoint.stored import BoxReader
from moe_train.errors import CheckpointError, Problem

ALLOWED = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # its name since Python 3.13
}
"""All that torch 2.11 to 2.13 writes for tensors. The record of a non-tensor is missing on purpose: torch would load
its content with an unrestricted pickle."""


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names that ``.metadata`` needs and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a permitted class or number format."""
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which no checkpoint of tensors needs")


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """Return what tensors a verified checkpoint holds, and where.

    Args:
        folder: the checkpoint; its files have the hashes that ``manifest`` says.
        manifest: lists the only files that the tensors may be read from.

    Raises:
        CheckpointError: it needs anything beyond descriptions of tensors, or points at a file without a hash.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(Problem(str(path), None, str(error), OLDER_OR_COPY)) from error
    assert isinstance(metadata, Metadata), f"{path} holds a {type(metadata).__name__}"
    unlisted = {place.relative_path for place in metadata.storage_data.values()} - manifest.files.keys()
    if unlisted:
        rule = f"points at files that the manifest does not list: {', '.join(sorted(unlisted))}"
        raise CheckpointError(Problem(str(path), None, rule, OLDER_OR_COPY))
    return metadata


class VerifiedReader(FileSystemReader):
    """torch's reader, given metadata that are read already."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planned pieces, reading no box twice and no rows that nobody here wants."""
        BoxReader(self.folder, self.metadata).read(plan.items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done
