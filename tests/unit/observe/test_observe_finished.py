"""Which runs a sweep passes by: the very same ones, with their final evaluation."""

import json

import pytest
import yaml

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError
from moe_train.observe.finished import is_passed_by


def config_of(folder, *overrides):
    return compose_config("train", TrainConfig, train_problems, [f"run.dir={folder}", *overrides])


def write(folder, config, step=400, loss=3.0):
    """A run folder with one train record and one evaluation at a step."""
    folder.mkdir()
    saved = config.model_dump(mode="json")
    saved["tokenizer"]["boundary_token"] = "<|endoftext|>"  # the run fills it in
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    records = [{"kind": "train", "step": step, "loss": 3.0}, {"kind": "eval", "step": step, "loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "run", config_of(tmp_path / "run"))
    return tmp_path / "run"


def test_a_finished_run_is_passed_by_and_said_to_be(folder, capsys):
    assert is_passed_by(config_of(folder))
    assert capsys.readouterr().out == f"finished before: {folder.resolve()}\n"


def test_how_it_is_computed_and_what_is_told_does_not_matter(folder):
    same = ("log.every=7", "checkpoint.every=3", "eval.every=9", "train.micro_batch=16", "data.cache_dir=elsewhere")
    assert is_passed_by(config_of(folder, *same))


@pytest.mark.parametrize(("step", "loss"), [(399, 3.0), (400, None)])
def test_a_run_that_is_not_finished_goes_on(tmp_path, step, loss):
    write(tmp_path / "run", config_of(tmp_path / "run"), step, loss)
    assert not is_passed_by(config_of(tmp_path / "run"))


def test_a_run_that_does_not_exist_is_not_passed_by(tmp_path):
    assert not is_passed_by(config_of(tmp_path / "none"))


def test_a_longer_training_of_the_same_run_goes_on(folder):
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("steps: 400", "steps: 500"))
    assert not is_passed_by(config_of(folder, "train.steps=500"))


def test_another_run_in_the_folder_is_refused_with_every_difference(folder):
    with pytest.raises(ConfigError) as caught:
        is_passed_by(config_of(folder, "optim.lr=0.5", "run.seed=4", "model.ffn.num_experts=4"))
    found = {problem.key: problem.value for problem in caught.value.problems}
    assert found == {"optim.lr": 0.5, "run.seed": 4, "model.ffn.num_experts": 4}
    assert "has 0.001" in str(caught.value)


def test_a_key_that_is_younger_than_the_run_is_passed_over(folder):
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["optim"]["router_lr_ratio"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert is_passed_by(config_of(folder, "optim.router_lr_ratio=0.5"))


def test_machines_that_may_not_share_the_folder_do_not_decide_by_it(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not is_passed_by(config_of(folder))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert is_passed_by(config_of(folder))


def test_one_rank_speaks(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert is_passed_by(config_of(folder)) and capsys.readouterr().out == ""
