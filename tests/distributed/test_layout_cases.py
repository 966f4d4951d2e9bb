"""The cases of the layout contract hold every option, and are configurations that users may run."""

import pytest
from layout_cases import CASES

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
