"""What Hydra calls at the end of a sweep that is the study of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.observe.study.callback import StudyCallback
from moe_train.observe.study.result import Study
from moe_train.observe.study.sentiment.result import write_sentiment_study


class SentimentStudyCallback(StudyCallback):
    """Writes the study of classifiers into the folder whose name its runs' names begin with."""

    def write(self, run_dirs: Sequence[Path], output: Path) -> Study:
        """Compare the runs and write table and picture into ``output``."""
        return write_sentiment_study(run_dirs, output)
