"""What is in a checkpoint, and how one rank's tensors become parts of tensors that belong to no layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_train.checkpoint.metadata import VerifiedReader
from moe_train.errors import CheckpointError, Problem

OTHER_MODEL = "resume with the model and optimizer that wrote it, or use checkpoint.resume=never"


@dataclass(frozen=True)
class CheckpointState:
    """What one rank puts into a checkpoint.

    Attributes:
        tensors: any dtype and device, by key: ``model.<fqn>``, ``optim.<fqn>.exp_avg``, ``optim.<fqn>.step``, ... The
            same keys on all ranks.
        expert_keys: keys of the tensors [L, ...] whose dim 0 is the experts of this rank. All other tensors are equal
            on all ranks, and one copy is written.
        trainer: what JSON can hold and is equal on all ranks: step, tokens, position in the data, identity of the run.
        random: state of this rank's random generators; None when it has none to keep.
    """

    tensors: Mapping[str, Tensor]
    expert_keys: Collection[str]
    trainer: Mapping[str, Any]
    random: bytes | None


def as_global(tensors: Mapping[str, Tensor], expert_keys: Collection[str], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the tensors as every layout sees them; they share memory with the given ones.

    Args:
        tensors: this rank's tensors, by key.
        expert_keys: keys of those [L, ...] whose dim 0 is the experts of this rank.
        mesh: axes ("edp", "ep").

    Returns:
        DTensors [E, ...] for the experts: as plain tensors all ranks would claim to hold the whole of the same key, and
        one rank's experts would silently overwrite the others'. Plain tensors for the rest: torch writes one copy.
    """
    unknown = set(expert_keys) - tensors.keys()
    assert not unknown, f"expert keys without a tensor: {sorted(unknown)}"
    placements = [Replicate(), Shard(0)]
    return {
        key: DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)
        if key in expert_keys
        else tensor.detach()
        for key, tensor in tensors.items()
    }


def write_tensors(folder: Path, state: CheckpointState, mesh: DeviceMesh) -> None:
    """Write all ranks' tensors into ``folder`` and wait until the disk has them. Collective.

    Raises:
        CheckpointException: on all ranks, when one could not write; not an ``Exception``.
    """
    save(as_global(state.tensors, state.expert_keys, mesh), storage_writer=FileSystemWriter(folder))


def read_tensors(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors of ``as_global`` in place from a checkpoint that ``differences`` found fitting. Collective.

    Raises:
        CheckpointException: on all ranks, when one could not read; not an ``Exception``.
    """
    load(tensors, storage_reader=VerifiedReader(folder, metadata))


def differences(metadata: Metadata, tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Return how a checkpoint's keys and global shapes differ from the tensors of ``as_global``, by key.

    Sections (the part of a key before the first dot) of which ``tensors`` has nothing are left out: inference asks for
    ``model`` alone.
    """
    sections = {key.partition(".")[0] for key in tensors}
    saved = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.partition(".")[0] in sections
    }
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = []
    for key in sorted(saved.keys() | wanted.keys()):
        if key not in saved:
            problems.append(Problem(key, None, f"is missing in the checkpoint; expected {wanted[key]}", OTHER_MODEL))
        elif key not in wanted:
            problems.append(Problem(key, None, f"is unexpected: the checkpoint has {saved[key]}", OTHER_MODEL))
        elif saved[key] != wanted[key]:
            rule = f"has shape {saved[key]} in the checkpoint, not {wanted[key]}"
            problems.append(Problem(key, None, rule, OTHER_MODEL))
    return problems


def require_fit(metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError with every difference, before any tensor is touched."""
    problems = differences(metadata, tensors)
    if problems:
        raise CheckpointError(problems)
