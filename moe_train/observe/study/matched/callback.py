"""What Hydra calls at the end of a sweep that is a matched study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from moe_train.observe.study.callback import StudyCallback
from moe_train.observe.study.matched.plan import DEPTH_STUDY, SWITCHHEAD_STUDY, Plan
from moe_train.observe.study.matched.result import write_matched_study
from moe_train.observe.study.result import Study


class MatchedStudyCallback(StudyCallback):
    """Writes a matched study into the folder whose name its runs' names begin with."""

    plan: ClassVar[Plan]
    """What is compared with what."""

    def write(self, run_dirs: Sequence[Path], output: Path) -> Study:
        """Compare the runs and write tables and picture into ``output``."""
        return write_matched_study(self.plan, run_dirs, output)


class SwitchHeadStudyCallback(MatchedStudyCallback):
    """The study of experts in attention."""

    plan = SWITCHHEAD_STUDY


class DepthStudyCallback(MatchedStudyCallback):
    """The study of blocks that only some tokens pass."""

    plan = DEPTH_STUDY
