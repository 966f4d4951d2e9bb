"""The variants of the studies of SwitchHead and Mixture-of-Depths: each is possible and run, and matched as it says."""

import functools

import pytest
from hydra import compose, initialize_config_dir

from moe_train.config.compose import compose_config, register
from moe_train.config.groups import config_dir, options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count
from moe_train.models.sizes import attention_size
from moe_train.observe.study.matched import DEPTH_STUDY, SWITCHHEAD_STUDY
from moe_train.observe.study.matched.plan import SEEDS

VOCABULARY = 256
"""Of bytes, at most."""
STUDIES = {plan.name: plan for plan in (SWITCHHEAD_STUDY, DEPTH_STUDY)}
VARIANTS = [(plan.name, variant) for plan in STUDIES.values() for variant in plan.variants]
MATCHES = [
    (plan.name, group.reference, contender.variant, equal)
    for plan in STUDIES.values()
    for group in plan.groups
    for contender in group.contenders
    for equal in contender.equal
]


@functools.cache
def composed(study, variant):
    """What a single run by hand is."""
    overrides = [f"experiment={study}", "hydra.mode=RUN", f"study={variant}"]
    return compose_config("train", TrainConfig, train_problems, overrides)


def sizes(study, variant):
    """What may be equal, by name."""
    config = composed(study, variant)
    counts = count(config.model, VOCABULARY, config.data.seq_len)
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    flops = counts.training_flops_per_token * tokens
    return {"parameters": counts.total, "tokens": tokens, "training FLOPs": flops}


@pytest.mark.parametrize(("study", "reference", "variant", "equal"), MATCHES)
def test_variants_are_matched_within_three_percent(study, reference, variant, equal):
    assert sizes(study, variant)[equal] == pytest.approx(sizes(study, reference)[equal], rel=0.03)


@pytest.mark.parametrize(("study", "variant"), VARIANTS)
def test_variants_differ_in_the_model_alone_but_for_the_longer_training(study, variant):
    config, base = composed(study, variant), composed(study, STUDIES[study].variants[0])
    assert config.model_dump() | {"model": 0, "train": 0} == base.model_dump() | {"model": 0, "train": 0}
    longer = variant == "depth_mod_longer"
    assert (config.train != base.train) == longer
    assert config.train.model_dump() | {"steps": 0} == base.train.model_dump() | {"steps": 0}
    assert (config.model.dim, config.model.init_std) == (base.model.dim, base.model.init_std)


def test_switchhead_has_the_parameters_of_dense_attention_itself():
    dense, switch = (
        attention_size(composed("switchhead_study", f"heads_{kind}").model) for kind in ("dense", "switch")
    )
    assert switch.stored == dense.stored and switch.multiplied < dense.multiplied
    wide = attention_size(composed("switchhead_study", "heads_switch_wide").model)
    assert wide.stored > dense.stored


def test_attention_differs_and_feed_forward_layers_do_not():
    names = ("dense", "few", "switch", "switch_wide")
    models = {name: composed("switchhead_study", f"heads_{name}").model for name in names}
    assert all(model.ffn == models["dense"].ffn and model.ffn.num_experts == 0 for model in models.values())
    assert [model.attention.kind for model in models.values()] == ["gqa", "gqa", "switchhead", "switchhead"]
    sparse, switchall = (composed("switchhead_study", f"heads_{kind}").model for kind in ("sparse", "switchall"))
    assert (switchall.attention, switchall.heads) == (models["switch"].attention, 2)
    assert [(ffn.num_experts, ffn.top_k) for ffn in (sparse.ffn, switchall.ffn)] == [(8, 2)] * 2
    assert switchall.ffn.balance.entropy is not None and sparse.ffn.balance.entropy is None


def test_every_other_block_takes_an_eighth_of_the_tokens():
    deep = ("mod", "mod_classifier", "mod_longer", "mod_same", "staged")
    found = {name: composed("depth_study", f"depth_{name}").model.depth for name in deep}
    assert {(depth.kind, depth.capacity, depth.every) for depth in found.values()} == {("mixture_of_depths", 0.125, 2)}
    assert [name for name, depth in found.items() if depth.causal == "classifier"] == ["mod_classifier"]
    plain = [composed("depth_study", f"depth_{name}").model.depth.kind for name in ("dense", "moe", "integrated")]
    assert plain == ["full"] * 3
    longer, same = (composed("depth_study", f"depth_mod_{name}").model for name in ("longer", "same"))
    assert longer == same
    predicted, scored = (composed("depth_study", f"depth_{name}").model for name in ("mod", "mod_classifier"))
    assert predicted.model_dump() | {"depth": 0} == scored.model_dump() | {"depth": 0}


def test_integrated_depth_has_as_many_experts_that_do_nothing():
    ffn, plain = (composed("depth_study", f"depth_{name}").model.ffn for name in ("integrated", "moe"))
    assert (ffn.num_experts, ffn.num_noop_experts, ffn.top_k) == (8, 8, 4)
    assert ffn.model_dump() | {"num_noop_experts": 0, "top_k": 2} == plain.model_dump()


@pytest.mark.parametrize("study", STUDIES)
def test_the_experiment_runs_every_variant_once(study):
    register("train", TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={study}"], return_hydra_config=True)
    params = config.hydra.sweeper.params
    plan = STUDIES[study]
    assert [name.strip() for name in params["study"].split(",")] == plan.variants
    assert str(params["run.seed"]) == ",".join(map(str, SEEDS))
    assert (config.run.name, config.hydra.mode.name) == (study, "MULTIRUN")
    callback = {"switchhead_study": "SwitchHeadStudyCallback", "depth_study": "DepthStudyCallback"}[study]
    assert config.hydra.callbacks.study._target_ == f"moe_train.observe.study.matched.{callback}"


def test_every_file_belongs_to_one_study():
    files = [name for name in options_of("study") if name.startswith(("heads_", "depth_"))]
    assert sorted(variant for _, variant in VARIANTS) == files
