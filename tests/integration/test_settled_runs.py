"""A run under plain torchrun gets the settings of a process by itself, and says so."""

from __future__ import annotations

import json
from pathlib import Path

from launch import records, run
from moe_train.config.process import MALLOC, SWITCH, THREADS, uses_glibc


def test_every_rank_is_settled_and_the_run_says_so(tiny: list[str], tmp_path: Path) -> None:
    cleared = dict.fromkeys([*MALLOC, SWITCH, THREADS])
    run("train", [*tiny, "train.steps=2", f"run.dir={tmp_path}/run"], tmp_path, ranks=2, variables=cleared)
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    message = next(row["message"] for row in records(tmp_path / "run", "event") if row["event"] == "settings")
    if uses_glibc():
        assert told["settings"] == {
            **{name: f"{value} (moe_train)" for name, value in MALLOC.items()},
            THREADS: "1 (torchrun or the user)",
        }
        assert told["variables"][SWITCH] == ",".join(MALLOC)
    assert all(f"{name} {value}" in message for name, value in told["settings"].items())
