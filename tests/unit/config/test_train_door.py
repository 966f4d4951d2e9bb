"""The command line as users meet it: exit status, messages, Hydra's own flags, sweeps."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe_train.config.compose import compose_config
from moe_train.config.groups import config_dir
from moe_train.config.routing import TopKRouterConfig
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig

REPOSITORY = config_dir().parent
QUICK_S = 10.0
ECHO = """
from moe_train.config.door import door
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig

@door("train", TrainConfig, train_problems)
def main(config: TrainConfig) -> None:
    print(f"ran {config.run.name} seed {config.run.seed} in {config.run.dir}")

main()
"""
"""A command like the trainer that only says what it was given."""
MISTAKE = """
import atexit, os

import torch

from moe_train.config.door import guarded
from moe_train.dist.world import world_from_environment
from moe_train.errors import DataError, Problem

def names():
    return {open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}

def work():
    with world_from_environment(60.0) as world:
        beside = world.in_background()
        world.sum_on_host(torch.ones(1)), beside.broadcast("told")
        run = [world, beside]
        run.append(run)  # as in a model, whose parts know each other
        print("at work", sorted(names()))
        try:
            raise OSError("the disk is gone")
        except OSError as error:
            raise DataError(Problem("data.path", "x", "cannot be read", "mend it")) from error

atexit.register(lambda: print("at the end", sorted(names())))
guarded(work)
"""
"""A mistake that is found when process groups exist; says which threads the process has."""


def run(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def train(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "moe_train.train", *arguments, folder=folder, **variables)


def echo(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "echo.py").write_text(ECHO)
    return run("echo.py", *arguments, folder=folder)


def test_no_thread_of_a_process_group_outlives_a_mistake(tmp_path: Path) -> None:
    """Status -6 in place of 2, seldom: a thread of gloo freed a tensor while Python was taken down."""
    (tmp_path / "mistake.py").write_text(MISTAKE)
    done = run("mistake.py", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("data error: 1 problem\n")
    at_work, at_the_end = done.stdout.splitlines()
    assert "gloo" in at_work, "else the test sees nothing"
    assert "gloo" not in at_the_end


def test_all_mistakes_are_listed_quickly_without_a_traceback(tmp_path: Path) -> None:
    started_s = time.monotonic()
    done = train("model.ffn.topk=2", "train.steps=0", "model=sparse_tny", "run.name=a/b", folder=tmp_path)
    elapsed_s = time.monotonic() - started_s
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "configuration error: 4 problems"
    assert sorted(line.split("=")[0].strip() for line in lines[1:]) == [
        "model", "model.ffn.topk", "run.name", "train.steps"
    ]  # fmt: skip
    assert "did you mean model.ffn.top_k?" in done.stderr
    assert elapsed_s < QUICK_S * (1 + os.getloadavg()[0] / (os.cpu_count() or 1)), "with some grace on a busy machine"
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.steps=1,2"], "train.steps=1,2: Ambiguous value"),
        (["optim.betas=[0.9"], "optim.betas=[0.9: "),
        (["-m", "run.seed=0,1", "model.heads=7"], "model.heads=7: must divide model.dim=256"),
    ],
)
def test_mistakes_of_syntax_and_in_sweeps(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = train(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_first_rank_speaks(tmp_path: Path) -> None:
    done = train("train.steps=0", folder=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=dense_tiny"],
        ["model=switch_tiny", "model/ffn/balance=[loss_free,z_loss]", "model.ffn.balance.z_loss.coef=0.5"],
        ["model.ffn.router.kind=group_limited", "model.ffn.router.groups=2", "model/ffn/capacity=device"],
    ],
)
def test_cfg_job_prints_what_the_run_would_use(overrides: list[str], tmp_path: Path) -> None:
    """Every key, those of chosen kinds and methods too, and none that a preset set for another kind."""
    done = train("--cfg", "job", *overrides, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    used = compose_config("train", TrainConfig, train_problems, overrides).model_dump(mode="json")
    used["run"]["dir"] = "runs/${run.name}"  # Hydra shows interpolations as they are written
    assert printed == used
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_shows_a_wrong_configuration_too(tmp_path: Path) -> None:
    done = train("--cfg", "job", "model.ffn.topk=2", folder=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["model"]["ffn"]["topk"] == 2


def test_a_package_of_the_configuration_is_shown(tmp_path: Path) -> None:
    done = train("--cfg", "job", "-p", "model.ffn.router", folder=tmp_path)
    assert yaml.safe_load(done.stdout) == TopKRouterConfig(scale=2.0).model_dump()


def test_help_shows_groups_and_keys(tmp_path: Path) -> None:
    done = train("--help", folder=tmp_path)
    assert done.returncode == 0
    for shown in ("sparse_tiny", "shakespeare", "global_batch", "expert_choice", "loss_free", "expert_dropout"):
        assert shown in done.stdout


def test_a_sweep_gives_each_job_a_name_of_its_own(tmp_path: Path) -> None:
    done = echo("-m", "run.seed=0,1", "model=dense_tiny,sparse_tiny", "train.steps=30", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = [line.split() for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert len(jobs) == 4
    names = {job[1] for job in jobs}
    assert len(names) == 4
    assert all("steps" not in name for name in names), "only what was swept"
    assert {job[5] for job in jobs} == {f"runs/{name}" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {"echo.py"}, "a sweep leaves no file of its own"


def test_a_sweep_over_lists_of_balance_methods(tmp_path: Path) -> None:
    done = echo("-m", "model/ffn/balance=[aux],[aux,z_loss],none", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert len(set(jobs)) == 3


def test_a_given_name_stays_in_a_sweep(tmp_path: Path) -> None:
    done = echo("-m", "run.seed=0,1", "run.name=mine-${run.seed}", folder=tmp_path)
    jobs = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert jobs == ["mine-0", "mine-1"]


def test_a_single_run(tmp_path: Path) -> None:
    done = echo("run.name=one", folder=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "ran one seed 0 in runs/one")
    assert [path.name for path in tmp_path.iterdir()] == ["echo.py"], "Hydra writes nothing"
