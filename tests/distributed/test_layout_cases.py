"""The cases of the layout contract hold every option, and are configurations that users may run."""

from itertools import product
from typing import get_args

import pytest
from layout_cases import CASES, ON_ALL_LAYOUTS, PLAIN

from moe_train.config.graph import GraphConfig
from moe_train.config.rules import model_problems


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_keeps_the_rules_of_the_configuration(case):
    assert list(model_problems(case.config().model)) == []


def test_the_cases_hold_every_router_balance_loss_and_capacity_rule():
    layers = [case.config().model.ffn for case in CASES]
    assert {ffn.router.kind for ffn in layers} == {
        "topk", "topk_softmax", "sigmoid", "noisy_topk", "switch", "gshard", "group_limited", "expert_choice", "hash",
        "sinkhorn", "base", "hierarchical",
    }  # fmt: skip
    for name in ("aux", "device", "communication"):
        losses = [getattr(ffn.balance, name) for ffn in layers]
        assert {loss.scope for loss in losses if loss is not None} == {"global", "sequence", "micro"}, name
    rules = [ffn.capacity for ffn in layers if ffn.capacity.kind == "factor"]
    assert {(rule.scope, rule.policy) for rule in rules} >= {
        (scope, policy) for scope in ("sequence", "global") for policy in ("position", "probability", "random")
    }
    for key, values in {"order": ("token", "choice"), "reroute": (False, True), "pad": (False, True)}.items():
        assert {getattr(rule, key) for rule in rules} == set(values)
    assert {ffn.capacity.scope for ffn in layers if ffn.capacity.kind == "device"} == {"sequence", "global", "rank"}


def test_the_cases_hold_every_kind_of_attention_network_and_prediction():
    models, off_on = [case.config().model for case in CASES], {False, True}
    grouped, latent = ([m.attention for m in models if m.attention.kind == kind] for kind in ("gqa", "mla"))
    ffns = [m.ffn for m in models]
    assert {config.qk_norm for config in grouped} == {"none", "head", "full"}
    assert all({getattr(config, key) for config in grouped} == off_on for key in ("qkv_bias", "out_bias", "sinks"))
    assert {config.full_every is None for config in grouped if config.window} == off_on
    assert {config.q_rank is None for config in latent} == {config.yarn.truncate for config in latent} == off_on
    assert all({getattr(ffn, key) for ffn in ffns} == off_on for key in ("expert_bias", "shared_gate"))
    activations = {kind for ffn in ffns for kind in (ffn.activation, ffn.expert_activation)}
    assert activations == {None, "swiglu", "geglu", "gelu", "relu", "swiglu_clamped"}
    assert {m.mtp.depth for m in models} == {0, 1, 2}


def test_the_cases_hold_every_way_to_couple_experts():
    off_on = {False, True}
    models = [model for case in CASES if (model := case.config().model).ffn.graph is not None]
    graphs = [model.ffn.graph for model in models]
    for key in ("expert", "adjacency", "normalize", "similarity", "pooling", "combiner"):
        assert {getattr(graph, key) for graph in graphs} == set(get_args(GraphConfig.model_fields[key].annotation)), key
    assert {graph.layers for graph in graphs} == {0, 1, 2}
    assert {graph.max_neighbors for graph in graphs} == {None, 0, 1, 2}
    assert all({getattr(graph, key) for graph in graphs} == off_on for key in ("self_edges", "recompute"))
    assert {graph.orthogonality > 0 for graph in graphs} == {graph.chunk_tokens is None for graph in graphs} == off_on
    assert {model.ffn.expert_bias for model in models} == {model.head_bias for model in models} == off_on
    assert {(model.norm, model.positions) for model in models} == set(product(("rms", "layer"), ("rotary", "learned")))
    assert {model.mtp.depth for model in models} == {0, 1}
    assert {case.config().model.ffn.graph.expert for case in ON_ALL_LAYOUTS if case not in PLAIN} == {"ffn", "block"}


@pytest.mark.parametrize("case", [case for case in CASES if not case.zero_router], ids=str)
def test_no_parameter_starts_at_zero_where_gradients_would_hide(case):
    assert [name for name, parameter in case.whole_model().named_parameters() if not parameter.any()] == []
