"""``python -m moe_train.report run.dir=DIR``: draw a run; ``study=DIR``: fit a law of scaling to a folder of runs."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.door import door
from moe_train.config.report_rules import report_problems
from moe_train.config.schema import ReportConfig
from moe_train.errors import DataError, Problem
from moe_train.observe.report import write_report
from moe_train.observe.sinks.jsonl import FILE_NAME


@door("report", ReportConfig, report_problems, shorthands={"study": "study.dir"})
def main(config: ReportConfig) -> None:
    """Write ``report/index.html`` into the folder of the run or the study and print its path.

    Raises:
        DataError: the run folder is missing or has no metrics; the study has too few finished runs.
    """
    if config.study is not None:
        # Imported here: counting parameters loads torch, which the report of a run does without.
        from moe_train.observe.study.scaling import write_scaling_report

        print(write_scaling_report(Path(config.study.dir).expanduser()))  # noqa: T201
        return
    assert config.run is not None, "the rules want a run or a study"
    run_dir = Path(config.run.dir).expanduser()
    check(run_dir)
    print(write_report(run_dir))  # noqa: T201


def check(run_dir: Path) -> None:
    """Refuse a folder that no training wrote.

    Raises:
        DataError: the folder or its metrics are missing.
    """
    if not run_dir.is_dir():
        raise DataError(Problem("run.dir", run_dir, "no such folder", "name the folder of a run: runs/NAME"))
    if not (run_dir / FILE_NAME).is_file():
        remedy = "name the folder of a run that has reached its first record"
        raise DataError(Problem("run.dir", run_dir, f"it holds no {FILE_NAME}", remedy))


if __name__ == "__main__":
    main()
