"""What Hydra calls at the end of a sweep that is the graph study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.observe.study.callback import StudyCallback
from moe_train.observe.study.graph.result import write_graph_study
from moe_train.observe.study.result import Study


class GraphStudyCallback(StudyCallback):
    """Writes the graph study into the folder whose name its runs' names begin with."""

    def write(self, run_dirs: Sequence[Path], output: Path) -> Study:
        """Compare the runs and write tables and picture into ``output``."""
        return write_graph_study(run_dirs, output)
