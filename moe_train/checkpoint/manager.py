"""Saves, publishes and prunes the checkpoints of one run, and finds the one to go on from.

A checkpoint is written into a hidden folder, gets its manifest last and becomes visible by one rename: at every instant
each visible folder is whole. What a killed process leaves behind is hidden, and removed by the next start.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from pathlib import Path

from moe_train.checkpoint.agreement import on_leader, together
from moe_train.checkpoint.faults import fault_point
from moe_train.checkpoint.files import sync_folder, write_synced
from moe_train.checkpoint.manifest import MANIFEST, METADATA, TRAINER, FileRecord, Manifest, record_of
from moe_train.checkpoint.reader import Checkpoint, latest_good, open_at, published_steps, random_name, step_name
from moe_train.checkpoint.state import CheckpointState, write_tensors
from moe_train.dist.mesh import Layout
from moe_train.dist.world import World
from moe_train.errors import CheckpointError

logger = logging.getLogger(__name__)

LEFT_BEHIND = re.compile(r"\.step_\d{8,}\.(saving|pruning)")
NOTHING_YET = -1


class CheckpointManager:
    """The checkpoints of one run. All ranks make one and call its methods at the same points.

    Args:
        folder: ``<run.dir>/checkpoints``, on a disk that all ranks share; made when needed.
        world: the processes.
        layout: of the ranks, noted in what is saved.
        keep: newest checkpoints that stay; at least 1.
    """

    def __init__(self, folder: Path, world: World, layout: Layout, keep: int) -> None:
        assert keep >= 1, f"keep={keep} would delete the checkpoint just written"
        self.folder, self.world, self.layout, self.keep = folder, world, layout, keep
        self.departure = NOTHING_YET
        """Step in this folder that the run goes on from; what is newer belongs to another history."""
        self.has_saved = False

    def resume(self, setting: str) -> Checkpoint | None:
        """Return the verified checkpoint to go on from, None to start anew. Collective.

        Args:
            setting: ``checkpoint.resume``: auto (the latest good one of this run), never, or a path (see `open_at`).

        Raises:
            CheckpointError: on all ranks; the path holds no good checkpoint, or all checkpoints of the run are damaged.
        """
        on_leader(self.world, "removing unfinished checkpoints", self._remove_left_behind)
        if setting == "never":
            return None
        if setting == "auto":
            found = latest_good(self.folder, self.world)
        else:
            found = open_at(Path(setting).expanduser(), self.world)
        if found is not None and found.path.resolve().parent == self.folder.resolve():
            self.departure = found.step
        return found

    def in_background(self) -> CheckpointManager:
        """Return this manager for a thread beside the training, to be used instead of this one. Collective.

        To be called after `resume`: it must know where the run departs from.
        """
        other = copy.copy(self)
        other.world = self.world.in_background()
        return other

    def save(self, step: int, state: CheckpointState) -> Path:
        """Publish a checkpoint and prune old ones; does nothing when this run has published the step. Collective.

        Args:
            step: optimizer steps done.
            state: this rank's part.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: on all ranks, when any could not write; earlier checkpoints are as they were.
        """
        final = self.folder / step_name(step)
        temp = self.folder / f".{final.name}.saving"
        try:
            if on_leader(self.world, "preparing a checkpoint", lambda: self._prepare(final, temp)):
                return final
            files = self._write(temp, state)
            manifest = Manifest(format=1, step=step, world_size=self.world.size, ep=self.layout.ep, files=files)
            on_leader(self.world, "publishing", lambda: self._publish(temp, final, manifest))
        except CheckpointError:
            if self.world.is_leader:
                shutil.rmtree(temp, ignore_errors=True)
            raise
        self.has_saved = True
        if self.world.is_leader:
            self._prune()
        return final

    def _prepare(self, final: Path, temp: Path) -> bool:
        """Make room for the checkpoint; return whether it is published already."""
        fault_point("ckpt.before_temp")
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        if not self.has_saved:
            self._set_aside_other_history()
        shutil.rmtree(temp, ignore_errors=True)
        return final.exists()

    def _write(self, temp: Path, state: CheckpointState) -> dict[str, FileRecord]:
        """Write this rank's files and return the records of all ranks' files."""
        together(self.world, "writing state", lambda: self._write_small_files(temp, state))
        together(self.world, "writing tensors", lambda: write_tensors(temp, state.parts, self.world))
        own = together(self.world, "hashing files", lambda: self._own_records(temp))
        files: dict[str, FileRecord] = {}
        for records in self.world.gather(own):
            assert isinstance(records, dict), "every rank gives a mapping"
            files |= records
        return files

    def _write_small_files(self, temp: Path, state: CheckpointState) -> None:
        temp.mkdir(exist_ok=True)  # on every rank: a network disk may show the leader's folder late
        if state.random is not None:
            write_synced(temp / random_name(self.world.rank), state.random)
        if self.world.is_leader:
            write_synced(temp / TRAINER, json.dumps(state.trainer, indent=1).encode())
        fault_point("ckpt.before_tensors")

    def _own_records(self, temp: Path) -> dict[str, FileRecord]:
        """Return the records of the files that this rank wrote: fresh in its page cache, and each hashed once."""
        paths = [*temp.glob(f"__{self.world.rank}_*.distcp"), *temp.glob(random_name(self.world.rank))]
        if self.world.is_leader:
            paths += [temp / METADATA, temp / TRAINER]
        return {path.name: record_of(path) for path in paths}

    def _publish(self, temp: Path, final: Path, manifest: Manifest) -> None:
        fault_point("ckpt.before_manifest")
        write_synced(temp / MANIFEST, manifest.render().encode())
        sync_folder(temp)
        fault_point("ckpt.before_rename")
        temp.rename(final)
        sync_folder(self.folder)

    def _prune(self) -> None:
        """Delete all but the newest. A failure is no reason to end a run whose checkpoint is safe."""
        try:
            fault_point("ckpt.before_prune")
            for step in published_steps(self.folder)[: -self.keep]:
                visible = self.folder / step_name(step)
                hidden = visible.rename(self.folder / f".{visible.name}.pruning")
                fault_point("ckpt.mid_prune")
                shutil.rmtree(hidden)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted, the disk may fill: %s", error)

    def _remove_left_behind(self) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if LEFT_BEHIND.fullmatch(path.name):
                shutil.rmtree(path)

    def _set_aside_other_history(self) -> None:
        """Rename what is newer than the departure: damaged, or of a run that is repeated from an earlier step.

        Left in place it would be taken for this run's: not saved again, resumed from, and pruned after this run's own.
        """
        for step in published_steps(self.folder):
            if step > self.departure:
                visible = self.folder / step_name(step)
                taken = len(list(self.folder.glob(f"superseded_{visible.name}_*")))
                aside = visible.rename(self.folder / f"superseded_{visible.name}_{taken + 1}")
                logger.warning("%s is newer than the start of this run; kept as %s", visible, aside)
