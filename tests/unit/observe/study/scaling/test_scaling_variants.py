"""The runs of the study of scaling: each possible, sizes equal over shapes, and one with more FLOPs than all others."""

import functools
import itertools

import pytest
from hydra import compose, initialize_config_dir

from moe_train.config.compose import compose_config, register
from moe_train.config.groups import config_dir, options_of
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count
from moe_train.observe.study.scaling.points import sizes_of

VOCABULARY = 257
EXPERIMENTS = [name for name in options_of("experiment") if name.startswith("scaling_laws")]
VARIANTS = [name for name in options_of("study") if name.startswith("scale_")]
SHAPES = {"dense": (1, 1), "e2_g2": (2, 2), "e4_g2": (4, 2), "e8_g2": (8, 2), "e4_g4": (4, 4), "e4_g8": (4, 8)}


@functools.cache
def composed(variant, experiment="scaling_laws"):
    """What a single run by hand is."""
    overrides = [f"experiment={experiment}", "hydra.mode=RUN", f"study={variant}"]
    return compose_config("train", TrainConfig, train_problems, overrides)


@functools.cache
def swept(experiment):
    """The values of each key of an experiment's sweep."""
    register("train", TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}"], return_hydra_config=True)
    return {key: [part.strip() for part in str(value).split(",")] for key, value in config.hydra.sweeper.params.items()}


def flops(variant, steps):
    config = composed(variant)
    tokens = steps * config.train.global_batch * config.data.seq_len
    return count(config.model, VOCABULARY, config.data.seq_len).training_flops_per_token * tokens


def jobs(experiment):
    params = swept(experiment)
    return list(itertools.product(params["study"], map(int, params["train.steps"]), params["run.seed"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_shape_of_its_name_and_the_size_of_the_dense_one(variant):
    config = composed(variant).model
    if variant == "scale_capacity":
        assert config.ffn.capacity.kind == "factor"
        plain = composed("scale_m_e4_g2").model.model_dump()
        plain["ffn"]["capacity"] = config.ffn.capacity.model_dump()
        assert config.model_dump() == plain
        return
    _, size, shape = variant.split("_", 2)
    expansion, granularity = SHAPES[shape]
    ffn = config.ffn
    assert (ffn.num_experts / ffn.top_k if ffn.num_experts else 1) == expansion
    assert ffn.top_k == granularity or not ffn.num_experts
    assert ffn.capacity.kind == "dropless" and ffn.router.scale == ffn.top_k
    if size != "xl" and shape != "dense":
        dense = composed(f"scale_{size}_dense").model
        assert sizes_of(config)[1] == sizes_of(dense)[1], "active parameters but for the routers"
        assert sizes_of(config)[0] > expansion * 0.6 * sizes_of(dense)[0]
        assert (config.dim, config.layers) == (dense.dim, dense.layers)


def test_runs_differ_in_the_model_alone_but_for_the_rate_of_the_largest():
    first = composed(VARIANTS[0]).model_dump() | {"model": 0}
    fitted = [variant for variant in VARIANTS if "_xl_" not in variant]
    assert all(composed(variant).model_dump() | {"model": 0} == first for variant in fitted)
    largest, middle = composed("scale_xl_e4_g2"), composed("scale_m_e4_g2")
    assert largest.optim.lr == middle.optim.lr * middle.model.dim / largest.model.dim
    rated = largest.optim.model_copy(update={"lr": middle.optim.lr})
    assert largest.model_copy(update={"optim": rated}).model_dump() | {"model": 0} == first
    assert composed(VARIANTS[0]).run.skip_finished
    assert composed(VARIANTS[0]).run.dir == "runs/scaling_laws/scale", "all in one folder, which the report reads"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_hydra_itself_knows_the_keys_of_a_sweep(experiment):
    """The sweeper hands them to Hydra, which refuses a key that no YAML names: defaults of ours need a "+"."""
    register("train", TrainConfig)
    job = [f"{key}={values[0]}" for key, values in swept(experiment).items()]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}", *job])
    assert config.train.steps == int(swept(experiment)["train.steps"][0])


def test_every_variant_is_run_and_nothing_twice():
    everything = [(job, swept(name).get("+model.ffn.capacity.factor")) for name in EXPERIMENTS for job in jobs(name)]
    assert sorted({variant for (variant, _, _), _ in everything}) == VARIANTS
    assert len({job for job, _ in everything}) == len(everything)
    factors = next(found for (variant, _, _), found in everything if variant == "scale_capacity")
    assert [float(factor) for factor in factors] == [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]


def test_sizes_experts_granularity_and_lengths_all_vary():
    fitted = [job for name in ("scaling_laws", "scaling_laws_large") for job in jobs(name)]
    assert {variant.split("_", 2)[2] for variant, _, _ in fitted} == set(SHAPES)
    assert {variant.split("_")[1] for variant, _, _ in fitted} == {"s", "m", "l"}
    assert len({steps for _, steps, _ in fitted}) == 3 and len(fitted) == 54


def test_small_models_trained_long_cost_what_large_ones_trained_briefly_do():
    small, middle, large = (flops(f"scale_{size}_dense", steps) for size, steps in (("s", 850), ("m", 360), ("l", 150)))
    assert middle == pytest.approx(small, rel=0.1) and large == pytest.approx(middle, rel=0.1)


def test_the_held_out_run_has_several_times_the_flops_of_every_other():
    (held_out,) = jobs("scaling_laws_heldout")
    others = [
        flops(variant, steps) for name in EXPERIMENTS for variant, steps, _ in jobs(name) if variant != held_out[0]
    ]
    assert flops(*held_out[:2]) > 2 * max(others)
