"""Which routers, balance methods and capacity rules are refused together, with which reason and remedy."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config import balance as b
from moe_train.config import routing as r
from moe_train.config.compose import compose_config
from moe_train.config.model import FFNConfig
from moe_train.config.routing_rules import future_leak_bits, routing_problems
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.config.validate import variants_of
from moe_train.errors import ConfigError, Problem

ROUTERS = variants_of(FFNConfig.model_fields["router"])
ON = {
    "aux": b.AuxLossConfig(),
    "importance_load": b.ImportanceLoadConfig(load_coef=0.0),
    "z_loss": b.ZLossConfig(),
    "entropy": b.EntropyConfig(),
    "device": b.DeviceLossConfig(),
    "communication": b.CommunicationLossConfig(),
    "loss_free": b.LossFreeConfig(),
}
"""Each balance method in a form that suits any router with weights."""
AUX = b.BalanceConfig(aux=b.AuxLossConfig())
LEAKY = r.ExpertChoiceRouterConfig(allow_future_leak=True)
TOP_K = {"switch": 1, "base": 1}
"""What is not 2."""


def ffn(router: r.RouterConfig | None = None, **fields: object) -> FFNConfig:
    fields = {"num_experts": 8, "top_k": 2, "router": router or r.TopKRouterConfig(), **fields}
    return FFNConfig(**fields)


def problems(*args: object, **fields: object) -> list[Problem]:
    return list(routing_problems(ffn(*args, **fields)))


def possible(kind: str, **fields: object) -> FFNConfig:
    """A layer with this router in which nothing is wrong, unless the fields make it so."""
    router = LEAKY if kind == "expert_choice" else ROUTERS[kind]()
    if kind == "hierarchical":
        router = r.HierarchicalRouterConfig(groups=2, top_groups=2)
    top_k = 4 if kind == "hierarchical" else TOP_K.get(kind, 2)
    return ffn(router, **{"top_k": top_k, **fields})


REFUSALS = {
    # choices
    "more choices than experts": (ffn(top_k=9), "top_k=9", "must not exceed model.ffn.num_experts=8", "lower"),
    "switch top-2": (ffn(r.SwitchRouterConfig()), "top_k=2", "chooses exactly 1 expert per token", "model.ffn.top_k=1"),
    "base top-2": (ffn(r.BaseRouterConfig()), "top_k=2", "kind=base chooses exactly 1 expert", "model.ffn.top_k=1"),
    "gshard top-1": (ffn(r.GShardRouterConfig(), top_k=1), "top_k=1", "exactly 2 experts", "model.ffn.top_k=2"),
    # gradients
    "topk top-1 normalised": (
        ffn(top_k=1), "router.normalize=selected", "every weight becomes 1", "set model.ffn.router.normalize=none",
    ),
    "topk top-1 normalised even with aux": (
        ffn(top_k=1, balance=AUX), "router.normalize=selected", "no gradient from the task", "normalize=none",
    ),
    "sigmoid top-1 normalised": (
        ffn(r.SigmoidRouterConfig(), top_k=1), "router.normalize=selected", "every weight becomes 1", "normalize=none",
    ),
    "group_limited top-1 normalised": (
        ffn(r.GroupLimitedRouterConfig(), top_k=1), "router.normalize=selected", "every weight becomes 1", "none",
    ),
    "topk_softmax top-1": (
        ffn(r.TopKSoftmaxRouterConfig(), top_k=1), "top_k=1", "softmax over one chosen expert is 1", "aux.coef=0.01",
    ),
    "topk_softmax top-1 with aux of weight 0": (
        ffn(r.TopKSoftmaxRouterConfig(), top_k=1, balance=b.BalanceConfig(aux=b.AuxLossConfig(coef=0.0))),
        "top_k=1", "no gradient from the task", "aux.coef=0.01",
    ),
    "topk_softmax top-1 with z-loss alone": (
        ffn(r.TopKSoftmaxRouterConfig(), top_k=1, balance=b.BalanceConfig(z_loss=b.ZLossConfig())),
        "top_k=1", "no gradient from the task", "aux.coef=0.01",
    ),
    "topk_softmax top-1 with a bias alone": (
        ffn(r.TopKSoftmaxRouterConfig(), top_k=1, balance=b.BalanceConfig(loss_free=b.LossFreeConfig())),
        "top_k=1", "no gradient from the task", "aux.coef=0.01",
    ),
    "topk_softmax top-1 with importance, which is constant": (
        ffn(r.TopKSoftmaxRouterConfig(), top_k=1, balance=b.BalanceConfig(importance_load=ON["importance_load"])),
        "top_k=1", "no gradient from the task", "aux.coef=0.01",
    ),
    "noisy_topk top-1": (
        ffn(r.NoisyTopKRouterConfig(), top_k=1), "top_k=1", "softmax over one chosen expert is 1", "aux.coef=0.01",
    ),
    "hierarchical, one group": (
        ffn(r.HierarchicalRouterConfig()), "router.top_groups=1", "weight of one chosen group is 1", "aux.coef=0.01",
    ),
    "hierarchical, one expert per group": (
        ffn(r.HierarchicalRouterConfig(top_groups=2)), "top_k=2", "has weight 1 in it", "aux.coef=0.01",
    ),
    "hierarchical top-1": (
        ffn(r.HierarchicalRouterConfig(), top_k=1), "top_k=1", "gets no gradient from the task", "aux.coef=0.01",
    ),
    # groups
    "groups do not divide": (
        ffn(r.GroupLimitedRouterConfig(groups=3)), "router.groups=3", "must divide model.ffn.num_experts=8", "change",
    ),
    "more chosen groups than groups": (
        ffn(r.GroupLimitedRouterConfig(groups=2, top_groups=3)), "router.top_groups=3", "must not exceed", "lower it",
    ),
    "too few experts in the chosen groups": (
        ffn(r.GroupLimitedRouterConfig(top_groups=1), top_k=3), "top_k=3", "must not exceed 2, the experts of", "raise",
    ),
    "two best of a group of one": (
        ffn(r.GroupLimitedRouterConfig(groups=8)), "router.group_score=top2", "have no two best", "group_score=max",
    ),
    "hierarchical groups do not divide": (
        ffn(r.HierarchicalRouterConfig(groups=3), balance=AUX), "router.groups=3", "must divide", "change",
    ),
    "hierarchical, more chosen groups than groups": (
        ffn(r.HierarchicalRouterConfig(top_groups=4), top_k=8, balance=AUX),
        "router.top_groups=4", "must not exceed model.ffn.router.groups=2", "lower it",
    ),
    "hierarchical, uneven choices": (
        ffn(r.HierarchicalRouterConfig(groups=4, top_groups=2), top_k=3, balance=AUX),
        "router.top_groups=2", "must divide model.ffn.top_k=3", "change",
    ),
    "hierarchical, more choices than a group has": (
        ffn(r.HierarchicalRouterConfig(groups=4), top_k=4, balance=AUX),
        "top_k=4", "must not exceed 2, the experts of", "raise model.ffn.router.top_groups",
    ),
    # expert choice
    "expert choice": (
        ffn(r.ExpertChoiceRouterConfig(), num_experts=16),
        "router.kind=expert_choice", "more than 5.61 bits per token", "allow_future_leak=true",
    ),
    "expert choice without a bound": (
        ffn(r.ExpertChoiceRouterConfig(), num_experts=4), "router.kind=expert_choice", "no bound is known", "allow",
    ),
    "expert choice with a capacity": (
        ffn(LEAKY, capacity=r.FactorCapacityConfig()), "capacity.kind=factor", "nothing overflows", "kind=dropless",
    ),
    "expert choice with a device budget": (
        ffn(LEAKY, capacity=r.DeviceCapacityConfig()), "capacity.kind=device", "nothing overflows", "kind=dropless",
    ),
    # balance
    "smooth load without noise": (
        ffn(balance=b.BalanceConfig(importance_load=b.ImportanceLoadConfig())),
        "balance.importance_load.load_coef=0.1", "has no gradient without the noise", "load_coef=0",
    ),
    "smooth load of all experts": (
        ffn(r.NoisyTopKRouterConfig(), top_k=8, balance=b.BalanceConfig(importance_load=b.ImportanceLoadConfig())),
        "balance.importance_load.load_coef=0.1", "all experts are chosen", "load_coef=0",
    ),
    "devices of the device loss": (
        ffn(balance=b.BalanceConfig(device=b.DeviceLossConfig(devices=3))),
        "balance.device.devices=3", "must divide model.ffn.num_experts=8", "change",
    ),
    "devices of the communication loss": (
        ffn(balance=b.BalanceConfig(communication=b.CommunicationLossConfig(devices=16))),
        "balance.communication.devices=16", "must divide", "change",
    ),
    "devices of the budget": (
        ffn(capacity=r.DeviceCapacityConfig(devices=5)), "capacity.devices=5", "must divide", "change",
    ),
    # capacity
    "pad with a global limit": (
        ffn(capacity=r.FactorCapacityConfig(pad=True, scope="global")),
        "capacity.pad=True", "a limit that all ranks share", "scope=sequence or rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "key", "rule", "remedy"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_with_reason_and_remedy(layer: FFNConfig, key: str, rule: str, remedy: str) -> None:
    found = list(routing_problems(layer))
    matching = [p for p in found if str(p).startswith(f"model.ffn.{key}: ") and rule in p.rule]
    assert len(matching) == 1, [str(problem) for problem in found]
    assert remedy in matching[0].remedy


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_is_possible(kind: str) -> None:
    assert list(routing_problems(possible(kind))) == []


SUITS = {
    "hash": set(),
    "expert_choice": {"z_loss"},
    **{kind: set(ON) - {"loss_free"} for kind in ("sinkhorn", "base", "noisy_topk", "hierarchical")},
}
"""Balance methods of the routers that do not go with all."""


@pytest.mark.parametrize(("kind", "method"), list(itertools.product(ROUTERS, ON)))
def test_which_balance_methods_go_with_which_router(kind: str, method: str) -> None:
    found = list(routing_problems(possible(kind, balance=b.BalanceConfig(**{method: ON[method]}))))
    if method in SUITS.get(kind, set(ON)):
        assert found == []
    else:
        (problem,) = found
        assert problem.key == f"model.ffn.balance.{method}"
        assert problem.remedy == f"set model.ffn.balance.{method}=null"
        assert kind in problem.rule


@pytest.mark.parametrize("kind", sorted(ROUTERS.keys() - {"expert_choice"}))
def test_which_routers_can_reroute(kind: str) -> None:
    found = list(routing_problems(possible(kind, capacity=r.FactorCapacityConfig(reroute=True))))
    if kind in ("hash", "hierarchical"):
        assert [p.key for p in found] == ["model.ffn.capacity.reroute"]
        assert f"not possible with router.kind={kind}: " in found[0].rule
    else:
        assert found == []


def test_rerouting_is_refused_to_expert_choice_as_any_limit_is() -> None:
    found = problems(LEAKY, capacity=r.FactorCapacityConfig(reroute=True))
    assert [p.key for p in found] == ["model.ffn.capacity.kind"]


POSSIBLE = {
    "top-1 unnormalised": ffn(r.TopKRouterConfig(normalize="none"), top_k=1),
    "one expert": ffn(num_experts=1, top_k=1),
    "all experts": ffn(top_k=8),
    "topk_softmax top-1 with aux": ffn(r.TopKSoftmaxRouterConfig(), top_k=1, balance=AUX),
    "topk_softmax top-1 with a device loss": ffn(
        r.TopKSoftmaxRouterConfig(), top_k=1, balance=b.BalanceConfig(device=b.DeviceLossConfig())
    ),
    "noisy_topk top-1 with a smooth load": ffn(
        r.NoisyTopKRouterConfig(), top_k=1, balance=b.BalanceConfig(importance_load=b.ImportanceLoadConfig())
    ),
    "hierarchical, one group, with aux": ffn(r.HierarchicalRouterConfig(), balance=AUX),
    "hierarchical, a single group": ffn(r.HierarchicalRouterConfig(groups=1)),
    "hierarchical, groups of one expert": ffn(r.HierarchicalRouterConfig(groups=8, top_groups=2)),
    "DeepSeek-V2": ffn(
        r.GroupLimitedRouterConfig(scores="softmax", group_score="max", groups=8, top_groups=3, normalize="none"),
        num_experts=160, top_k=6,
    ),
    "DeepSeek-V3": ffn(
        r.GroupLimitedRouterConfig(groups=8, top_groups=4, scale=2.5), num_experts=256, top_k=8,
        balance=b.BalanceConfig(aux=b.AuxLossConfig(coef=1e-4, scope="sequence"), loss_free=b.LossFreeConfig()),
    ),
    "V2's max over groups of one": ffn(r.GroupLimitedRouterConfig(groups=8, group_score="max")),
    "weights kept sum to all without normalising": ffn(
        r.TopKRouterConfig(normalize="none"), capacity=r.FactorCapacityConfig(renormalize="after")
    ),
    "pad per rank": ffn(capacity=r.FactorCapacityConfig(pad=True, scope="rank")),
    "all of capacity": ffn(
        capacity=r.FactorCapacityConfig(reroute=True, renormalize="after", order="choice", policy="random", pad=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", POSSIBLE.values(), ids=POSSIBLE.keys())
def test_not_refused(layer: FFNConfig) -> None:
    assert [str(problem) for problem in routing_problems(layer)] == []


@pytest.mark.parametrize(("top_k", "num_experts", "bits"), [(2, 16, "5.61"), (6, 64, "19.64"), (8, 256, "39.63")])
def test_the_leak_bound_is_the_published_one(top_k: int, num_experts: int, bits: str) -> None:
    leak = future_leak_bits(top_k, num_experts)
    assert f"{leak:.2f}" == bits
    (problem,) = problems(r.ExpertChoiceRouterConfig(), top_k=top_k, num_experts=num_experts)
    assert f"more than {bits} bits per token" in problem.rule


@pytest.mark.parametrize(("top_k", "num_experts"), [(2, 4), (3, 4), (4, 4)])
def test_the_leak_formula_gives_no_bound_from_a_half_on(top_k: int, num_experts: int) -> None:
    assert future_leak_bits(top_k, num_experts) is None


def test_all_problems_of_a_layer_at_once() -> None:
    layer = ffn(
        r.ExpertChoiceRouterConfig(),
        top_k=9,
        balance=b.BalanceConfig(aux=b.AuxLossConfig(), device=b.DeviceLossConfig(devices=3)),
        capacity=r.FactorCapacityConfig(),
    )
    assert [problem.key.removeprefix("model.ffn.") for problem in routing_problems(layer)] == [
        "top_k", "router.kind", "balance.aux", "balance.device", "balance.device.devices", "capacity.kind",
    ]  # fmt: skip


def test_a_dense_model_has_no_routing_to_refuse() -> None:
    overrides = ["model=dense_tiny", "model.ffn.router.kind=expert_choice"]
    assert compose_config("train", TrainConfig, train_problems, overrides).model.ffn.num_experts == 0


def test_the_command_line_gets_these_problems_with_all_others() -> None:
    overrides = ["model/ffn/router=switch", "model/ffn/capacity=device", "model.ffn.num_experts=6", "model.heads=7"]
    with pytest.raises(ConfigError) as error:
        compose_config("train", TrainConfig, train_problems, overrides)
    keys = {problem.key for problem in error.value.problems}
    assert {"model.ffn.top_k", "model.ffn.capacity.devices", "model.heads"} <= keys


@given(kind=st.sampled_from(sorted(ROUTERS)), top_k=st.integers(1, 9), num_experts=st.integers(1, 9))
def test_every_problem_can_be_read(kind: str, top_k: int, num_experts: int) -> None:
    layer = possible(kind, top_k=top_k, num_experts=num_experts, balance=b.BalanceConfig(**ON))
    for problem in routing_problems(layer):
        assert problem.key.startswith("model.ffn.")
        assert problem.rule and problem.remedy
        assert "\n" not in str(problem)
