"""DeepSpeed's launcher starts the ranks of a hostfile; this one names the machine of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import ROOT, curve, end_of, free_port, run, running

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_hostfile_starts_the_ranks(engine: str, tiny: list[str], tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# slots=7 are not here\nlocalhost slots=2\n")
    overrides = [*tiny, "parallel.ep=2", f"parallel.engine={engine}", "train.steps=4"]
    words = ["bash", str(ROOT / "launch/deepspeed.sh"), str(hostfile), *overrides, f"run.dir={tmp_path}/run"]
    alone = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    alone["DEEPSPEED_ARGS"] = f"--no_ssh_check --master_addr=127.0.0.1 --master_port={free_port()}"
    with running(words, tmp_path, alone) as command:
        end_of(command, 240.0, 0)
    run("train", [*overrides, f"run.dir={tmp_path}/twin"], tmp_path, ranks=2)
    assert curve(tmp_path / "run") == curve(tmp_path / "twin")
