"""The variants of the graph study: each is possible and run, the kinds match in size, the others change one thing."""

import functools

import pytest
from hydra import compose, initialize_config_dir

from moe_train.config.compose import compose_config, register
from moe_train.config.graph import GraphConfig
from moe_train.config.groups import config_dir, options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count
from moe_train.observe.study.graph.outcome import BY_EXPERTS, BY_LAYERS, COMPARED, SIZES

VARIANTS = [name for name in options_of("study") if name.startswith(("graph_", "silent_", "dense_", "sparse_"))]
OTHERS = [name for name in VARIANTS if COMPARED.fullmatch(name) is None]
VOCABULARY = 4096
CHANGED = {
    "graph_count": {"normalize": "count"},
    "graph_degree": {"normalize": "degree"},
    "graph_softmax": {"adjacency": "softmax"},
    "graph_no_adjacency": {"adjacency": "none"},
    "graph_cosine": {"similarity": "cosine"},
    "graph_dot": {"similarity": "dot"},
    "graph_attention": {"pooling": "attention"},
    "graph_weighted": {"pooling": "weighted"},
    "graph_linear": {"combiner": "linear"},
    "graph_gelu_norm": {"combiner": "gelu_norm"},
    "graph_open": {"adjacency_mean": 2.0},
    "graph_shut": {"adjacency_mean": -2.0},
    "graph_even": {"adjacency_std": 0.0},
    "graph_self": {"self_edges": True},
    "graph_neighbors1": {"max_neighbors": 1},
    "graph_orthogonal": {"orthogonality": 0.1},
    "graph_plain": {"prenorm": False},
    "silent_plain": {"prenorm": False, "max_neighbors": 0},
    "graph_original": {"prenorm": False, "combiner": "gelu_norm"},
    "silent_original": {"prenorm": False, "combiner": "gelu_norm", "max_neighbors": 0},
    "graph_block": {"expert": "block", "combiner": "gelu_norm"},
    "silent_block": {"expert": "block", "combiner": "gelu_norm", "max_neighbors": 0},
}


@functools.cache
def composed(variant):
    """What a single run by hand is."""
    overrides = ["experiment=graph_study", "hydra.mode=RUN", f"study={variant}"]
    return compose_config("train", TrainConfig, train_problems, overrides)


def sizes(variant):
    config = composed(variant)
    return count(config.model, VOCABULARY, config.data.seq_len)


def swept(experiment):
    """The variants and the seeds of an experiment's sweep, and the whole of Hydra's configuration."""
    register("train", TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    params = config.hydra.sweeper.params
    return [name.strip() for name in params["study"].split(",")], str(params["run.seed"]), config


def around(variant):
    """The configuration but for the feed-forward part, and for what names the same attention differently."""
    config = composed(variant).model_dump()
    config["model"]["attention"]["kv_heads"] = config["model"]["attention"]["kv_heads"] or config["model"]["heads"]
    return config | {"model": config["model"] | {"ffn": None}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_feed_forward_part_differs(variant):
    assert around(variant) == around("graph_e4")


@pytest.mark.parametrize("size", SIZES)
def test_the_dense_model_has_the_flops_of_the_coupled_one(size):
    config = composed(f"dense_{size}").model.ffn
    assert config.num_experts == 0 and config.graph is None
    flops = [sizes(f"{kind}_{size}").training_flops_per_token for kind in ("graph", "dense")]
    assert flops[1] == pytest.approx(flops[0], rel=0.005)


@pytest.mark.parametrize("size", SIZES)
def test_the_sparse_model_has_the_parameters_of_the_coupled_one(size):
    config = composed(f"sparse_{size}")
    ffn = config.model.ffn
    assert (ffn.num_experts, ffn.top_k, ffn.graph, ffn.router.scale) == (8, 2, None, 2.0)
    assert {name for name, section in ffn.balance if section is not None} == {"aux", "z_loss"}
    assert config.optim.router_lr_ratio == 0.1
    totals = [sizes(f"{kind}_{size}").total for kind in ("graph", "sparse")]
    assert totals[1] == pytest.approx(totals[0], rel=0.01)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "l0"])
def test_the_silent_model_is_the_coupled_one_without_messages(size):
    graph, silent = (composed(f"{kind}_{size}").model.ffn for kind in ("graph", "silent"))
    assert silent.graph.max_neighbors == 0 and graph.graph.max_neighbors is None
    assert graph == silent.model_copy(update={"graph": graph.graph})
    assert silent.graph.model_dump() | {"max_neighbors": None} == graph.graph.model_dump()


def test_sizes_are_what_their_names_say():
    coupled = {size: composed(f"graph_{size}").model.ffn for size in SIZES}
    assert {e: coupled[size].num_experts for e, size in BY_EXPERTS.items()} == {e: e for e in BY_EXPERTS}
    assert {n: coupled[size].graph.layers for n, size in BY_LAYERS.items()} == {n: n for n in BY_LAYERS}
    assert {coupled[size].num_experts for size in BY_LAYERS.values()} == {4}
    assert {coupled[size].graph.layers for size in BY_EXPERTS.values()} == {2}
    assert {ffn.expert_dim for ffn in coupled.values()} == {128}


@pytest.mark.parametrize("variant", OTHERS)
def test_the_others_change_one_thing_in_the_base(variant):
    base, ffn = composed("graph_e4").model.ffn, composed(variant).model.ffn
    assert ffn.model_dump() | {"graph": None} == base.model_dump() | {"graph": None}
    assert ffn.graph == GraphConfig(**{"prenorm": True, **CHANGED[variant]}) != base.graph


def test_the_experiments_run_every_variant_once():
    sweeps = [swept(experiment) for experiment in ("graph_study", "graph_study_more")]
    assert sorted(name for names, _, _ in sweeps for name in names) == VARIANTS
    assert sorted(sweeps[1][0]) == sorted(OTHERS)
    assert [seeds for _, seeds, _ in sweeps] == ["0,1,2"] * 2


@pytest.mark.parametrize("experiment", ["graph_study", "graph_study_more"])
def test_both_graph_experiments_fill_one_table(experiment):
    _, _, config = swept(experiment)
    assert (config.run.name, config.hydra.mode.name) == ("graph_study", "MULTIRUN")
    assert config.hydra.callbacks.study._target_ == "moe_train.observe.study.graph.GraphStudyCallback"
