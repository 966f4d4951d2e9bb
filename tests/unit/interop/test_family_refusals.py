"""Which models a public class cannot express, and what it says then."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from family_samples import config_of, model_of

from moe_train.config.model import ModelConfig
from moe_train.config.routing import LearnedRouterConfig, RouterConfig
from moe_train.interop.families import FAMILIES, expressed_by

KINDS = [section.model_fields["kind"].default for section in get_args(get_args(RouterConfig)[0])]


def changed(model_type: str, **changes: Any) -> ModelConfig:
    """A family's sample with changes, by sections: ffn={"every": 2}."""
    keys = model_of(config_of(model_type)).model_dump()
    for name, change in changes.items():
        keys[name] = {**keys[name], **change} if isinstance(change, dict) else change
    return ModelConfig.model_validate(keys)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention": {"qkv_bias": True}}, "biases of attention: all projections have one, or none has"),
    ("llama", {"attention": {"qk_norm": "head"}}, "attention.qk_norm=head, not none"),
    ("llama", {"attention": {"sinks": True}}, "attention has sinks"),
    ("llama", {"attention": {"window": 4}}, "attention.window=4: this class has no windows"),
    ("llama", {"attention": {"kind": "mla"}}, "attention is of kind mla, not gqa"),
    ("llama", {"ffn": {"activation": "gelu"}}, "dense networks have the activation gelu, not swiglu"),
    ("llama", {"ffn": {"num_experts": 4}}, "the model has experts"),
    ("llama", {"mtp": {"depth": 1}}, "mtp.depth=1: this class has no multi-token prediction"),
    ("mixtral", {"ffn": {"num_experts": 0}}, "the model is dense"),
    ("mixtral", {"ffn": {"every": 2}}, "every=2: all layers must be MoE"),
    ("mixtral", {"ffn": {"first_dense": 1}}, "first_dense=1: all layers must be MoE"),
    ("mixtral", {"ffn": {"num_shared_experts": 1}}, "has shared experts"),
    ("mixtral", {"ffn": {"expert_bias": True}}, "experts have biases"),
    ("mixtral", {"ffn": {"expert_activation": "relu"}}, "experts have the activation relu, not swiglu"),
    ("mixtral", {"ffn": {"router": {"kind": "topk", "normalize": "none"}}},
     "router.normalize=none: the weights of a token must sum to one"),
    ("mixtral", {"ffn": {"router": {"kind": "topk_softmax", "bias": True}}}, "the router has a bias"),
    ("mixtral", {"ffn": {"router": {"kind": "topk_softmax", "gate_dim": 8}}},
     "the router has a hidden layer: router.gate_dim"),
    ("mixtral", {"ffn": {"router": {"kind": "sigmoid"}}}, "router.kind=sigmoid"),
    ("mixtral", {"ffn": {"balance": {"loss_free": {}}}},
     "balance.loss_free: this class has no place for the bias on the choice"),
    ("mixtral", {"ffn": {"capacity": {"kind": "factor", "eval_factor": 2.0}}},
     "capacity.eval_factor limits experts in evaluation too"),
    ("mixtral", {"attention": {"qkv_bias": True}}, "queries, keys and values have biases"),
    ("mixtral", {"attention": {"window": 4, "full_every": 2}},
     "attention.full_every=2: all layers must have the same window"),
    ("qwen2_moe", {"ffn": {"num_shared_experts": 0, "shared_gate": False}}, "has no shared expert"),
    ("qwen2_moe", {"ffn": {"shared_gate": False}}, "shared experts have no gate"),
    ("qwen2_moe", {"attention": {"out_bias": True}}, "the output projection of attention has a bias"),
    ("qwen2_moe", {"ffn": {"activation": "geglu", "expert_activation": "swiglu"}},
     "dense networks have the activation geglu, not swiglu"),
    ("qwen3_moe", {"attention": {"qk_norm": "full"}}, "attention.qk_norm=full, not head"),
    ("olmoe", {"attention": {"head_dim": 12}}, "attention.head_dim=12 is not dim / heads"),
    ("gpt_oss", {"attention": {"sinks": False}}, "attention has no sinks"),
    ("gpt_oss", {"ffn": {"expert_bias": False}}, "experts have no biases"),
    ("gpt_oss", {"ffn": {"router": {"kind": "topk_softmax"}}}, "the router has no bias"),
    ("gpt_oss", {"ffn": {"router": {"kind": "topk_softmax", "gate_dim": 8}}},
     "the router has a hidden layer: router.gate_dim"),
    ("gpt_oss", {"ffn": {"router": {"kind": "topk"}}}, "router.kind=topk, not topk_softmax"),
    ("gpt_oss", {"ffn": {"expert_activation": "swiglu"}},
     "experts have the activation swiglu, not swiglu_clamped"),
    ("deepseek_v2", {"ffn": {"router": {"kind": "topk"}}},
     "router.normalize=selected: this class does not normalise"),
    ("deepseek_v2", {"ffn": {"router": {"kind": "group_limited", "normalize": "none", "group_score": "max"}}},
     "router.scores=sigmoid, not softmax"),
    ("deepseek_v2", {"ffn": {"router": {"kind": "group_limited", "normalize": "none", "scores": "softmax"}}},
     "router.group_score=top2, not max"),
    ("deepseek_v2", {"ffn": {"shared_gate": True}}, "shared experts have a gate"),
    ("deepseek_v2", {"ffn": {"shared_dim": 7}},
     "the shared experts' width 14 is no multiple of expert_dim=12"),
    ("deepseek_v2", {"attention": {"kind": "gqa"}}, "attention is of kind gqa, not mla"),
    ("deepseek_v2", {"mtp": {"depth": 2}}, "mtp.depth=2: this class has no multi-token prediction"),
    ("deepseek_v3", {"ffn": {"every": 2}}, "every=2: all layers after the first dense ones must be MoE"),
    ("deepseek_v3", {"ffn": {"router": {"kind": "group_limited", "group_score": "max"}}},
     "router.group_score=max, not top2"),
    ("deepseek_v3", {"ffn": {"router": {"kind": "group_limited", "scores": "softmax"}}},
     "router.scores=softmax, not sigmoid"),
    ("deepseek_v3", {"ffn": {"num_experts": 1, "top_k": 1}}, "one expert: groups are chosen by their two best"),
    ("deepseek_v3", {"ffn": {"first_dense": 3}, "mtp": {"depth": 1}},
     "mtp.depth=1: the modules' layers must be MoE"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "reason"), CASES)
def test_reason(model_type, changes, reason):
    keys = {name: {**change, "kind": "mla"} if change == {"kind": "mla"} else change
            for name, change in changes.items()}  # fmt: skip
    if "kind" in keys.get("attention", {}):
        # Another kind of attention has none of the sample's keys.
        base = changed(model_type).model_dump()
        model = ModelConfig.model_validate(base | {"attention": keys["attention"]})
    else:
        model = changed(model_type, **keys)
    assert FAMILIES[model_type].refusals(model) == [reason]
    assert FAMILIES[model_type].refusals(changed(model_type)) == []


def test_every_router_is_expressed_or_refused_by_all():
    said = {"topk", "topk_softmax", "sigmoid", "group_limited"}
    assert said < set(KINDS) and len(KINDS) == 12
    for kind in set(KINDS) - said:
        for model_type in FAMILIES:
            if model_type != "llama":
                reasons = FAMILIES[model_type].refusals(changed(model_type, ffn={"router": {"kind": kind}}))
                assert any(reason.startswith(f"router.kind={kind}") for reason in reasons), (model_type, kind)


def test_what_acts_in_training_only_hinders_nothing():
    for model_type in FAMILIES:
        model = changed(model_type)
        if model_type == "llama":
            continue
        assert isinstance(model.ffn.router, LearnedRouterConfig)
        router = model.ffn.router.model_dump() | {"jitter": 0.1, "expert_dropout": 0.2}
        balance = model.ffn.balance.model_dump() | {"z_loss": {}, "aux": {"coef": 0.5}, "device": {"devices": 2}}
        for capacity in ({"kind": "factor", "reroute": True}, {"kind": "device", "devices": 2}):
            keys = {"router": router, "balance": balance, "capacity": capacity}
            assert FAMILIES[model_type].refusals(changed(model_type, ffn=keys)) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_expresses_its_own(model_type):
    found = expressed_by(changed(model_type))
    assert not isinstance(found, list) and found.model_type == model_type


def test_nobody_can():
    reasons = expressed_by(changed("mixtral", ffn={"every": 2, "router": {"kind": "hash"}}))
    assert isinstance(reasons, list)
    assert {"mixtral: every=2: all layers must be MoE", "mixtral: router.kind=hash", "llama: the model has experts",
            "deepseek_v3: attention is of kind gqa, not mla"} <= set(reasons)  # fmt: skip
    assert {reason.split(":")[0] for reason in reasons} == set(FAMILIES)
