import subprocess
import sys

import pytest

from moe_train.errors import DataError
from moe_train.report import check


def report(run_dir):
    command = [sys.executable, "-m", "moe_train.report", f"run.dir={run_dir}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_door_writes_the_page_and_prints_where(make_run):
    run_dir = make_run(steps=20)
    result = report(run_dir)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(run_dir / "report" / "index.html")
    assert (run_dir / "report" / "index.html").is_file()


def test_a_missing_folder_is_one_line_and_status_2(tmp_path):
    result = report(tmp_path / "none")
    assert result.returncode == 2
    assert "run.dir" in result.stderr and "no such folder" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        check(tmp_path)


def test_a_run_with_empty_metrics_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    check(tmp_path)
