import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.observe.records import (
    COUPLED,
    DEEP,
    ROUTED,
    attention_health,
    depth_health,
    expert_health,
    finite,
    graph_health,
    layer_title,
    load_imbalance,
    moe_layers,
    parse_record,
    to_json,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same_but_null(value, written):
    """Whether ``written`` is ``value`` with every number that is not finite replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return written is None
    if isinstance(value, list):
        return len(value) == len(written) and all(map(same_but_null, value, written))
    if isinstance(value, dict):
        return value.keys() == written.keys() and all(same_but_null(item, written[key]) for key, item in value.items())
    return value == written


@given(st.dictionaries(st.text(), values, max_size=6))
def test_every_record_is_one_line_of_strict_json(record):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = to_json(record)
    assert "\n" not in line and line.isascii()
    assert same_but_null(record, json.loads(line, parse_constant=refuse))


@given(st.data())
def test_a_torn_line_is_no_record(data):
    line = to_json({"kind": "train", "step": 7, "loss": 1.5, "moe/layer_00/load": [0.5, 0.5], "note": "a } b"})
    assert parse_record(line) is not None
    assert parse_record(line[: data.draw(st.integers(0, len(line) - 1))]) is None


@pytest.mark.parametrize("line", ["3", "null", "[]", '{"step": 1}', '{"kind": "other", "step": 1}', '{"kind": "eval"}'])
def test_json_that_is_no_record(line):
    assert parse_record(line) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "3", True, [1.0]])
def test_what_is_no_finite_number(value):
    assert finite(value) is None


def test_imbalance_is_largest_over_mean():
    assert load_imbalance([0.25] * 4) == pytest.approx(1.0)
    assert load_imbalance([0.5, 0.5, 0.0, 0.0]) == pytest.approx(2.0)
    assert load_imbalance([1.0, 0.0, 0.0, 0.0]) == pytest.approx(4.0)


@pytest.mark.parametrize("load", [None, [], [0.0, 0.0], [0.5, None], [math.nan, 1.0]])
def test_imbalance_of_an_unknown_load(load):
    assert load_imbalance(load) is None


def test_health_names_the_worst_layer_and_sums_over_layers():
    health = expert_health(
        {
            "kind": "train",
            "step": 1,
            "moe/layer_01/load": [0.5, 0.5],
            "moe/layer_01/dead_experts": 0,
            "moe/layer_01/dropped_fraction": 0.02,
            "moe/layer_01/entropy": 0.5,
            "moe/layer_03/load": [1.0, 0.0],
            "moe/layer_03/dead_experts": 1,
            "moe/layer_03/dropped_fraction": 0.04,
            "moe/layer_03/entropy": 0.7,
        }
    )
    assert health is not None
    assert (health.worst_layer, health.imbalance, health.dead_experts) == ("layer_03", 2.0, 1)
    assert health.dropped_fraction == pytest.approx(0.03)
    assert health.entropy == pytest.approx(0.6)


def test_health_of_a_record_without_numbers_is_unknown_not_zero():
    health = expert_health({"kind": "train", "step": 1, "moe/layer_01/load": None})
    assert health is not None
    assert health.imbalance is None and health.dead_experts is None and health.dropped_fraction is None


def test_a_dense_model_has_no_health():
    assert expert_health({"kind": "train", "step": 1, "loss": 2.0}) is None


def test_layers_are_told_apart_by_their_figures():
    keys = [
        "loss",
        "moe/layer_03/load",
        "moe/layer_01/load",
        "moe/layer_02/similarity",
        "moe/x/load",
        "moe/layer_02/cos",
    ]
    assert moe_layers([*keys, *keys], ROUTED) == ["layer_01", "layer_03"]
    assert moe_layers(keys, COUPLED) == ["layer_02"]


def test_health_of_coupled_experts_names_the_most_alike_and_averages_the_rest(coupled_record):
    health = graph_health(coupled_record)
    assert health is not None
    assert (health.similarity, health.worst_layer) == (0.5, "layer_03")
    assert health.effective_rank == pytest.approx(2.5)
    assert health.message_norm == pytest.approx((0.2 + 0.4 + 0.9) / 3)  # the null is no zero
    assert health.adjacency_entropy == pytest.approx(1.0)
    assert expert_health(coupled_record) is None


def test_a_layer_without_a_finite_similarity_is_not_the_worst(coupled_record):
    health = graph_health(coupled_record | {"moe/layer_03/similarity": math.nan, "moe/layer_01/similarity": -0.1})
    assert health is not None
    assert (health.similarity, health.worst_layer) == (-0.1, "layer_01")


@pytest.mark.parametrize("norm", [None, [], "torn", [None], [math.inf]])
def test_health_of_coupled_experts_without_numbers_is_unknown_not_zero(norm):
    record = {"kind": "train", "step": 1, "moe/layer_01/similarity": None, "moe/layer_01/message_norm": norm}
    health = graph_health(record)
    assert health is not None and health.worst_layer == "layer_01"
    values = (health.similarity, health.effective_rank, health.message_norm, health.adjacency_entropy)
    assert values == (None, None, None, None)


def test_routed_experts_have_no_health_of_a_graph():
    assert graph_health({"kind": "train", "step": 1, "moe/layer_01/load": [0.5, 0.5]}) is None


def test_parts_of_a_block_are_told_apart(parts_record):
    experts, attention, depth = expert_health(parts_record), attention_health(parts_record), depth_health(parts_record)
    assert experts is not None and attention is not None and depth is not None
    assert (experts.worst_layer, experts.imbalance, experts.dead_experts) == ("layer_03", 1.0, 0)
    assert (experts.dropped_fraction, experts.entropy) == (0.5, 0.5), "attention, which drops nothing, is left out"
    assert (attention.worst_layer, attention.imbalance, attention.dead_experts) == ("layer_03_values", 4.0, 5)
    assert (attention.dropped_fraction, attention.entropy) == (0.0, 0.75)
    assert (depth.chosen_share, depth.causal_share) == (0.125, 0.125)
    assert (depth.causal_accuracy, depth.worst_layer) == (0.75, "layer_01_depth")
    assert graph_health(parts_record) is None
    assert moe_layers(parts_record, DEEP) == ["layer_01_depth", "layer_03_depth"]


def test_experts_in_attention_alone_are_no_health_of_feed_forward_layers(parts_record):
    record = {key: value for key, value in parts_record.items() if "layer_03/" not in key}
    assert expert_health(record) is None and attention_health(record) is not None
    assert attention_health({"moe/layer_03/load": [1.0]}) is None and depth_health({"moe/layer_03/load": [1.0]}) is None


def test_depth_without_numbers_is_unknown_not_zero():
    health = depth_health({"moe/layer_01_depth/chosen_share": None, "moe/layer_03_depth/causal_accuracy": math.nan})
    assert health is not None and health.worst_layer == "layer_01_depth"
    assert (health.chosen_share, health.causal_share, health.causal_accuracy) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("layer_00", "layer 0"),
        ("layer_03_values", "layer 3, values"),
        ("layer_120_depth", "layer 120, depth"),
        ("layer_12_two_words", "layer 12, two words"),
        ("layer_x", "layer x"),
    ],
)
def test_titles_of_layers(name, title):
    assert layer_title(name) == title
