"""What DeepSpeed cannot do is refused before anything starts, with the way that works."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from tomllib import loads

import pytest

from moe_train.config import deepspeed_rules
from moe_train.config.compose import compose_config
from moe_train.config.deepspeed_rules import VERSION, deepspeed_problems
from moe_train.config.schema import TrainConfig

WITH = "parallel.engine=deepspeed"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The rules are those of a machine that has it."""
    monkeypatch.setattr(deepspeed_rules, "version", lambda name: VERSION)


def problems(*keys):
    config = compose_config("train", TrainConfig, lambda config: [], list(keys))
    return list(deepspeed_problems(config, 4))


@pytest.mark.parametrize(
    "keys",
    [
        (),
        (WITH,),
        (WITH, "parallel.zero_stage=0"),
        (WITH, "parallel.zero_stage=2", "train.precision=bf16"),
        (WITH, "parallel.zero_stage=1", "parallel.offload=true", "train.precision=bf16"),
        (WITH, "train.clip_norm=null", "parallel.ep=2", "parallel.placement=auto", "parallel.remat=full"),
        ("parallel.dp_shard=2", "parallel.placement=auto", "train.precision=fp64"),
    ],
    ids=str,
)
def test_what_works_is_let_pass(keys):
    assert problems(*keys) == []


@pytest.mark.parametrize(
    ("keys", "key", "rule", "remedy"),
    [
        (["parallel.zero_stage=2"], "parallel.zero_stage", "engine is torch", "parallel.dp_shard"),
        (["parallel.offload=true"], "parallel.offload", "engine is torch", "parallel.engine=deepspeed"),
        ([WITH, "parallel.zero_stage=3"], "parallel.zero_stage", "layers of its own", "parallel.zero_stage=2"),
        ([WITH, "parallel.zero_stage=0", "parallel.offload=true"], "parallel.offload", "where the model is", "=1"),
        ([WITH, "parallel.zero_stage=0", "train.precision=bf16"], "parallel.zero_stage", "gradients of zero", "=1"),
        ([WITH, "train.precision=fp64"], "train.precision", "fp32", "train.precision=fp32"),
        ([WITH, "parallel.dp_shard=2"], "parallel.dp_shard", "FSDP2", "parallel.zero_stage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_is_refused_with_the_way_that_works(keys, key, rule, remedy):
    (problem,) = problems(*keys)
    assert problem.key == key
    assert rule in problem.rule
    assert remedy in problem.remedy


def test_all_problems_come_at_once():
    keys = {p.key for p in problems(WITH, "parallel.zero_stage=3", "parallel.dp_shard=2", "train.precision=fp64")}
    assert keys == {"parallel.zero_stage", "parallel.dp_shard", "train.precision"}


def test_a_missing_deepspeed_is_said_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(deepspeed_rules, "version", missing)
    (problem,) = problems(WITH)
    assert (problem.key, problem.value) == ("parallel.engine", "deepspeed")
    assert 'pip install "moe_train[deepspeed]"' in problem.remedy
    assert problems() == [], "who does not ask for it does not need it"


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed_rules, "version", lambda name: "0.18.0")
    (problem,) = problems(WITH)
    assert "0.18.0" in problem.rule
    assert VERSION in problem.rule


def test_the_version_is_that_of_the_package_and_of_the_constraints():
    extras = loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["deepspeed"] == [f"deepspeed=={VERSION}"]
    assert f"deepspeed=={VERSION}" in extras["dev"]
    assert f"deepspeed=={VERSION}" in (ROOT / "constraints.txt").read_text().splitlines()
