"""Finds checkpoints, verifies them, and loads them into any layout."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.agreement import on_leader, together
from moe_train.checkpoint.manifest import MANIFEST, OLDER_OR_COPY, TRAINER, Manifest, damage_of, read_manifest
from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.state import read_tensors, require_fit
from moe_train.dist.parts import Part
from moe_train.dist.world import World
from moe_train.errors import CheckpointError, Problem

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Return the name of a step's folder; names sort like steps up to 99,999,999."""
    return f"step_{step:08d}"


def random_name(rank: int) -> str:
    """Return the name of the file with a rank's random state."""
    return f"random_{rank:05d}.bin"


def step_of(path: Path) -> int | None:
    """Return the step of a published checkpoint's folder, None for any other name, file or link."""
    match = STEP_NAME.fullmatch(path.name)
    is_step = match and step_name(int(match[1])) == path.name and path.is_dir() and not path.is_symlink()
    return int(match[1]) if match and is_step else None


def published_steps(folder: Path) -> list[int]:
    """Return the steps published in a folder, ascending; none when there is no such folder. Warns of odd names."""
    if not folder.is_dir():
        return []
    found = {path: step_of(path) for path in sorted(folder.iterdir())}
    for path, step in found.items():
        if step is None and path.name.startswith("step"):
            logger.warning("ignored %s: not the folder of a checkpoint", path)
    return sorted(step for step in found.values() if step is not None)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all have the hashes of its manifest.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        trainer: what the trainer gave when it was saved.
        random: random state of the rank with this number; None when there was no such rank.
        manifest: its files and the layout that wrote it.
        world: the processes that opened it.
    """

    path: Path
    step: int
    trainer: dict[str, Any]
    random: bytes | None
    manifest: Manifest
    world: World

    def fill(self, parts: Mapping[str, Part], partial: bool = False) -> None:
        """Overwrite the boxes of the parts in place with their values in the checkpoint. Collective.

        A rank reads the files' boxes that overlap with its own, of large ones only the rows.

        Args:
            parts: by key as in `CheckpointState`, in the present layout; the values are converted to each tensor's
                dtype and device. A section may be left out whole: ``model.*`` alone is fine.
            partial: whether single keys may be left out too, other ones on each rank; and of a tensor any boxes. What
                is asked for and missing in the checkpoint is an error all the same.

        Raises:
            CheckpointError: on all ranks. Keys or shapes differ: all are listed and nothing is overwritten. Reading
                failed: the tensors are undefined.
        """
        metadata = together(self.world, "reading metadata", lambda: read_metadata(self.path, self.manifest))
        together(self.world, "comparing tensors", lambda: require_fit(metadata, parts, partial))
        together(self.world, "reading tensors", lambda: read_tensors(self.path, metadata, parts, self.world))


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """Verify one checkpoint, the ranks sharing the files between them. Collective.

    Raises:
        CheckpointError: on all ranks; lists every file that is missing or not what the manifest says.
    """
    manifest = on_leader(world, "reading the manifest", lambda: _manifest_of(folder))
    share = sorted(manifest.files)[world.rank :: world.size]
    together(world, "verifying files", lambda: _require_intact(folder, manifest, share))
    trainer, random = together(world, "reading state", lambda: _read_state(folder, manifest, world.rank))
    return Checkpoint(folder, manifest.step, trainer, random, manifest, world)


def latest_good(folder: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint in ``folder`` that verifies, None when there is none at all. Collective.

    Warns of each damaged one, of what is wrong with it and of the steps that are lost by going back.

    Raises:
        CheckpointError: on all ranks, when there are checkpoints but all are damaged: to start anew without a word
            would throw the run away.
    """
    steps = on_leader(world, "looking for checkpoints", lambda: published_steps(folder))
    problems: list[Problem] = []
    for step in reversed(steps):
        try:
            checkpoint = open_checkpoint(folder / step_name(step), world)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        if problems and world.is_leader:
            shown = "; ".join(str(problem) for problem in problems)
            logger.warning("going back to step %d, %d steps are lost: %s", step, steps[-1] - step, shown)
        return checkpoint
    if problems:
        rule = f"none of the {len(steps)} checkpoints is intact"
        remedy = "restore one from a copy, or start anew with checkpoint.resume=never"
        raise CheckpointError([Problem(str(folder), None, rule, remedy), *problems])
    return None


def open_at(path: Path, world: World) -> Checkpoint:
    """Return the checkpoint that a user means by ``path``. Collective.

    Args:
        path: the folder of a checkpoint, or a run folder or its folder of checkpoints, then the latest good one.
        world: the processes.

    Raises:
        CheckpointError: on all ranks, when there is none or it is damaged.
    """
    found_one = on_leader(world, "looking for checkpoints", lambda: is_checkpoint(path))
    if found_one:
        return open_checkpoint(path, world)
    found = latest_good(path / CHECKPOINTS, world) or latest_good(path, world)
    if found is None:
        remedy = f"give the folder of a checkpoint ({step_name(100)}) or of a run with checkpoints"
        raise CheckpointError(Problem(str(path), None, "holds no checkpoint", remedy))
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, by its name or because it holds a manifest."""
    return step_of(path) is not None or (path / MANIFEST).is_file()


def _manifest_of(folder: Path) -> Manifest:
    """Read the manifest and compare it with the folder's name; a folder that a user renamed has no step in its name."""
    manifest = read_manifest(folder)
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(Problem(str(folder), None, f"is of step {manifest.step}", "give it the name of its step"))
    return manifest


def _require_intact(folder: Path, manifest: Manifest, names: list[str]) -> None:
    damages = [damage_of(folder / name, manifest.files[name]) for name in names]
    problems = [damage for damage in damages if damage is not None]
    if problems:
        raise CheckpointError(problems)


def _read_state(folder: Path, manifest: Manifest, rank: int) -> tuple[dict[str, Any], bytes | None]:
    """Return the trainer's state and the rank's random state, of a folder whose files are verified."""
    trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    if not isinstance(trainer, dict):
        raise CheckpointError(Problem(str(folder / TRAINER), None, "is not a JSON object", OLDER_OR_COPY))
    name = random_name(rank)
    return trainer, (folder / name).read_bytes() if name in manifest.files else None
