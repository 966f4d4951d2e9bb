"""The variants of the routing study: each is possible, each is run, and they differ in routing alone."""

import functools

import pytest
from hydra import compose, initialize_config_dir

from moe_train.config.compose import compose_config, register
from moe_train.config.groups import config_dir, options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count

EXPERIMENTS = ("routing_study", "routing_study_more")
OF_OTHERS = ("graph_", "silent_", "dense_", "sparse_", "heads_", "depth_", "scale_", "sentiment_")
"""Beginnings of the variants of other studies."""
VARIANTS = [name for name in options_of("study") if not name.startswith(OF_OTHERS)]
VOCABULARY, LENGTH = 4096, 256


@functools.cache
def composed(variant):
    """What a single run by hand is."""
    name = f"run.name=routing_study-{variant}-seed_1"
    overrides = ["experiment=routing_study", "hydra.mode=RUN", f"study={variant}", "run.seed=1", name]
    return compose_config("train", TrainConfig, train_problems, overrides)


def swept(experiment):
    """The variants and the seeds of an experiment's sweep, and the whole of Hydra's configuration."""
    register("train", TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    params = config.hydra.sweeper.params
    return [name.strip() for name in params["study"].split(",")], str(params["run.seed"]), config


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_possible_and_changes_routing_only(variant):
    config, base = composed(variant), composed("topk")
    sizes = [count(c.model, VOCABULARY, LENGTH).active for c in (config, base)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01), "equal active parameters, but for the routers"
    assert config.train.steps * config.train.global_batch * config.data.seq_len == 80 * 8 * 256, "equal tokens"
    same = {"ffn": None}
    assert config.model.model_dump() | same == base.model.model_dump() | same
    ratio = {"router_lr_ratio": None}
    assert config.optim.model_dump() | ratio == base.optim.model_dump() | ratio
    assert config.data == base.data and config.eval.every == 0
    assert (config.model.ffn.capacity.kind == "dropless") != variant.startswith("capacity_"), "drops are one thing"
    assert variant == "topk" or (config.model.ffn, config.optim) != (base.model.ffn, base.optim)


def test_the_experiments_run_every_variant_once():
    sweeps = {experiment: swept(experiment) for experiment in EXPERIMENTS}
    names = [name for variants, _, _ in sweeps.values() for name in variants]
    assert sorted(names) == VARIANTS
    assert [seeds for _, seeds, _ in sweeps.values()] == ["0,1,2", "0"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_both_experiments_fill_one_table(experiment):
    _, _, config = swept(experiment)
    assert (config.run.name, config.hydra.mode.name) == ("routing_study", "MULTIRUN")
    assert config.hydra.callbacks.study._target_ == "moe_train.observe.study.StudyCallback"


def test_every_router_and_balance_method_is_a_variant():
    configs = [composed(variant).model.ffn for variant in VARIANTS]
    assert {ffn.router.kind for ffn in configs} == set(options_of("model/ffn/router"))
    balance = {name for ffn in configs for name, section in ffn.balance if section is not None}
    assert balance == {"aux", "importance_load", "z_loss", "device", "communication", "loss_free"}
    assert {ffn.balance.aux.scope for ffn in configs if ffn.balance.aux} == {"global", "sequence", "micro"}
    bias = {ffn.router.kind for ffn in configs if ffn.balance.loss_free}
    assert bias == {"topk", "sigmoid"}
