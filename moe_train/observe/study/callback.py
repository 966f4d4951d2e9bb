"""What Hydra calls at the end of a sweep that is a study."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from moe_train.observe.study.result import Study, write_study


class StudyCallback(Callback):
    """Writes the study into the folder whose name its runs' names begin with: ``runs/NAME`` for ``runs/NAME-...``.

    All these runs are taken, whichever command made them: a study may be run in parts.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write table and picture, once over all ranks, and tell where they lie."""
        if os.environ.get("RANK", "0") != "0":
            return
        folder = Path(config.run.dir).expanduser()
        study = self.write(sorted(folder.parent.glob(f"{glob.escape(folder.name)}-*")), folder)
        sys.stdout.write(f"study:   {study.table.resolve()}\npicture: {study.picture.resolve()}\n")

    def write(self, run_dirs: Sequence[Path], output: Path) -> Study:
        """Compare the runs and write the study into ``output``."""
        return write_study(run_dirs, output)
