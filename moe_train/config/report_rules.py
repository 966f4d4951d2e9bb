"""What a report is made of: a run or a study."""

from __future__ import annotations

from moe_train.config.schema import ReportConfig
from moe_train.errors import Problem


def report_problems(config: ReportConfig) -> list[Problem]:
    """Return what is wrong when not exactly one thing is named."""
    if config.run is None and config.study is None:
        return [Problem("run.dir", None, "is required", "set run.dir=DIR for a run, or study=DIR for a study")]
    if config.run is not None and config.study is not None:
        rule = f"a report is of a run or of a study, and run.dir={config.run.dir} is set too"
        return [Problem("study.dir", config.study.dir, rule, "leave one of them out")]
    return []
