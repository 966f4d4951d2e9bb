"""The folder of all records: whether it is that of a checkpoint, and how it becomes so.

Each record says in its header which checkpoint it is of, so that an interrupted write goes on where it ended and no
stale record is ever read. The index is written last: where it fits and every record does, nothing is written at all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moe_train.checkpoint.agreement import on_leader, together
from moe_train.checkpoint.files import sync_folder, write_synced
from moe_train.dist.world import World
from moe_train.errors import DataError, Problem
from moe_train.inference.offload.record import FORMAT_NAMES, PARTIAL, Form, is_intact, write_record
from moe_train.inference.offload.source import Source

logger = logging.getLogger(__name__)

KEY = "inference.offload.folder"
INDEX = "index.json"
"""Says what the folder holds."""
CLAIM = "writing.lock"
"""Held by the process that writes; it also marks a folder without an index as one of ours."""
ELSEWHERE = "name a folder on a disk that all ranks share, has room, and may be written"


def index_of(forms: Sequence[Form], step: int) -> dict[str, Any]:
    """Return what the index must say.

    Args:
        forms: of all layers, at least one.
        step: of the checkpoint.
    """
    return {
        "format": 1,
        "checkpoint": {"step": step, "identity": forms[0].identity},
        "dtype": FORMAT_NAMES[forms[0].dtype],
        "layers": {
            form.layer: {
                "experts": form.num_experts,
                "expert_bytes": form.values_bytes,
                "tensors": {name: list(shape) for name, shape in form.tensors},
            }
            for form in forms
        },
    }


def read_index(folder: Path) -> object:
    """Return the content of the index; None when there is none, or it is damaged."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def require_records(folder: Path, forms: Sequence[Form], step: int, source: Source, world: World) -> None:
    """Write what the folder lacks; nothing where it is whole. Collective, on a disk that all ranks share.

    The ranks share the records between them, whoever holds which experts: the folder serves any layout.

    Args:
        folder: of the records; made if need be.
        forms: of all layers.
        step: of the checkpoint.
        source: the checkpoint.
        world: the processes.

    Raises:
        CheckpointError: on all ranks: the folder holds other files, cannot be written, is too small, or another
            process writes it now.
    """
    share = [(form, expert) for form in forms for expert in range(world.rank, form.num_experts, world.size)]
    wanted = index_of(forms, step)
    lacking = together(world, "looking at experts on disk", lambda: lacking_of(folder, share))
    has_index = on_leader(world, "looking at experts on disk", lambda: read_index(folder) == wanted)
    num_lacking = sum(len(some) for some in world.gather(lacking) if isinstance(some, list))
    if has_index and num_lacking == 0:
        return
    with claimed(folder, world):
        on_leader(world, "preparing experts on disk", lambda: prepare(folder, forms, wanted, num_lacking))
        for form in forms:  # in rounds of a layer: no rank is ever ahead of another by more than a collective may last
            mine = [expert for other, expert in lacking if other == form]
            together(world, "writing experts", partial(write_layer, folder, form, mine, source))
        on_leader(world, "writing the index of experts", lambda: finish(folder, wanted))


def lacking_of(folder: Path, records: Sequence[tuple[Form, int]]) -> list[tuple[Form, int]]:
    """Return those records that are not there as they must be."""
    return [(form, expert) for form, expert in records if not is_intact(folder, form, expert)]


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Let no other process write the folder for as long as the context lasts. Collective."""
    held: list[int] = []
    try:
        on_leader(world, "opening the folder of experts", lambda: held.append(claim(folder)))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)  # which gives the lock back, as does the end of the process


def claim(folder: Path) -> int:
    """Make the folder ours and return a locked file of it.

    Raises:
        DataError: it holds other files, cannot be written, or is being written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names and not names & {INDEX, CLAIM}:
            rule = f"holds other files: {', '.join(sorted(names)[:3])}"
            raise DataError(Problem(KEY, folder, rule, "name an empty folder, or one that does not exist"))
        descriptor = os.open(folder / CLAIM, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(Problem(KEY, folder, f"cannot be written: {error.strerror}", ELSEWHERE)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        rule = "is being written by another process"
        raise DataError(Problem(KEY, folder, rule, "wait until that has begun to run, or name another")) from error
    return descriptor


def prepare(folder: Path, forms: Sequence[Form], wanted: dict[str, Any], num_lacking: int) -> None:
    """Take away what is stale, and see that there is room for the rest.

    Raises:
        DataError: there is not.
    """
    found = read_index(folder)
    if found is not None and found != wanted:
        logger.warning("%s held other experts than this checkpoint's: they are written anew", folder)
    (folder / INDEX).unlink(missing_ok=True)
    kept = {form.name(expert) for form in forms for expert in range(form.num_experts)}
    for path in list(folder.glob("*/*.safetensors*")):
        if str(path.relative_to(folder)) not in kept or path.name.endswith(PARTIAL):
            path.unlink(missing_ok=True)
    # A record that is replaced exists twice for a moment; more than that is not asked for.
    needed_bytes = num_lacking * max(form.values_bytes for form in forms)
    free_bytes = shutil.disk_usage(folder).free + stale_bytes(folder, forms)
    if free_bytes < needed_bytes:
        rule = f"has {free_bytes / 2**30:.1f} GiB free, and the experts take {needed_bytes / 2**30:.1f}"
        raise DataError(Problem(KEY, folder, rule, ELSEWHERE))
    total = sum(form.num_experts for form in forms)
    logger.info("writing %d of %d experts to %s", num_lacking, total, folder)


def stale_bytes(folder: Path, forms: Sequence[Form]) -> int:
    """Return the size of the records that will be replaced."""
    records = [(form, expert) for form in forms for expert in range(form.num_experts)]
    paths = [folder / form.name(expert) for form, expert in lacking_of(folder, records)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def write_layer(folder: Path, form: Form, experts: Sequence[int], source: Source) -> None:
    """Write some records of a layer, and wait until the disk has them."""
    for expert in experts:
        write_record(folder, form, expert, partial(source.read, form, expert=expert))
    if experts:
        sync_folder((folder / form.name(experts[0])).parent)


def finish(folder: Path, wanted: dict[str, Any]) -> None:
    """Publish the index."""
    partial_path = folder / (INDEX + PARTIAL)
    write_synced(partial_path, (json.dumps(wanted, indent=1) + "\n").encode())
    partial_path.replace(folder / INDEX)
    sync_folder(folder)
