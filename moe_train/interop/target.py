"""The folder that an export writes: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.checkpoint.agreement import on_leader, together
from moe_train.checkpoint.files import sync_folder
from moe_train.dist.world import World
from moe_train.errors import Problem


def free_problems(to: Path) -> list[Problem]:
    """Return what is wrong with a target: a file, a folder with something in it, a place that may not be written.

    Makes nothing.
    """
    existing = next(path for path in (to, *to.absolute().parents) if path.exists())
    if not existing.is_dir():
        rule = f"{existing} is a file, not a folder"
    elif existing == to and any(to.iterdir()):
        rule = "is a folder with something in it, which is not overwritten"
    elif not os.access(existing, os.W_OK | os.X_OK):
        rule = f"{existing} may not be written"
    else:
        return []
    return [Problem("to", to, rule, "name a folder that does not exist yet")]


@contextmanager
def appearing(to: Path, world: World) -> Iterator[Path]:
    """Yield a folder beside the target; it gets the target's name when the body ends. Collective.

    The body must fail on all ranks or on none. When it fails, nothing stays.

    Raises:
        CheckpointError: on all ranks; the disk fails.
    """
    name = on_leader(world, "naming the folder", lambda: f"{to.name}.partial-{uuid.uuid4().hex[:8]}")
    partial = to.absolute().parent / name
    try:
        # On every rank: a network disk may show the leader's folder late.
        together(world, "making the folder", lambda: partial.mkdir(parents=True, exist_ok=True))
        yield partial
        on_leader(world, "publishing", lambda: _publish(partial, to))
    except BaseException:
        if world.is_leader:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, to: Path) -> None:
    sync_folder(partial)
    partial.rename(to.absolute())  # replaces an empty folder
    sync_folder(to.absolute().parent)
