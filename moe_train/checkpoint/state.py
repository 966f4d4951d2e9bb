"""What is in a checkpoint, and how it goes to the disk and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moe_train.checkpoint.metadata import VerifiedReader
from moe_train.checkpoint.planner import PartReader, PartWriter
from moe_train.dist.parts import Part
from moe_train.dist.world import World
from moe_train.errors import CheckpointError, Problem

OTHER_MODEL = "resume with the model and optimizer that wrote it, or use checkpoint.resume=never"


@dataclass(frozen=True)
class CheckpointState:
    """What one rank puts into a checkpoint.

    Attributes:
        parts: any dtype and device, by key: ``model.<fqn>``, ``optim.<fqn>.exp_avg``, ``optim.<fqn>.step``, ... The
            same keys on all ranks, whose boxes cover each tensor; of what several ranks hold one copy is written.
        trainer: what JSON can hold and is equal on all ranks: step, tokens, position in the data, identity of the run.
        random: state of this rank's random generators; None when it has none to keep.
    """

    parts: Mapping[str, Part]
    trainer: Mapping[str, Any]
    random: bytes | None


def write_tensors(folder: Path, parts: Mapping[str, Part], world: World) -> None:
    """Write all ranks' tensors into ``folder`` and wait until the disk has them. Collective.

    Raises:
        CheckpointException: on all ranks, when one could not write; not an ``Exception``.
    """
    save(dict(parts), storage_writer=FileSystemWriter(folder), planner=PartWriter(), process_group=world.group)


def read_tensors(folder: Path, metadata: Metadata, parts: Mapping[str, Part], world: World) -> None:
    """Fill the parts in place from a checkpoint that ``differences`` found fitting. Collective.

    A rank reads only what overlaps with its boxes.

    Raises:
        CheckpointException: on all ranks, when one could not read; not an ``Exception``.
    """
    reader = VerifiedReader(folder, metadata)
    load(dict(parts), storage_reader=reader, planner=PartReader(), process_group=world.group)


def sizes_of(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint by key."""
    entries = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def differences(metadata: Metadata, parts: Mapping[str, Part], partial: bool = False) -> list[Problem]:
    """Return how a checkpoint's keys and shapes differ from those of ``parts``, by key.

    Sections (the part of a key before the first dot) of which ``parts`` has nothing are left out: inference asks for
    ``model`` alone. Tensors without values are left out: they are in no file.

    Args:
        metadata: of the checkpoint.
        parts: what is to be filled.
        partial: whether keys of the checkpoint may be missing in ``parts``.
    """
    sections = {key.partition(".")[0] for key in parts}
    wanted = {key: part.shape for key, part in parts.items() if 0 not in part.shape}
    saved = {
        key: shape
        for key, shape in sizes_of(metadata).items()
        if (key in parts or not partial) and key.partition(".")[0] in sections and 0 not in shape
    }
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


def require_fit(metadata: Metadata, parts: Mapping[str, Part], partial: bool = False) -> None:
    """Raise CheckpointError with every difference, before any tensor is touched."""
    problems = differences(metadata, parts, partial)
    if problems:
        raise CheckpointError(problems)
