"""Capacity: how much room there is, who is kept, and what becomes of the weights."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from capacity_loops import ORDERS, POLICIES, batch_of, kept_by_loop, random_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_samples import context_of, make_layer, plain_loop, routing_of, routing_to, tokens
from torch import Tensor
from waiting import NoWaiting

from moe_train.config.routing import CapacityConfig, DeviceCapacityConfig, DroplessConfig, FactorCapacityConfig
from moe_train.moe.capacity import Capacity, Plan, is_padded
from moe_train.moe.limit import Limit
from moe_train.moe.routing import Routing

EXPERTS, LENGTH = 4, 6
SCOPES = ("sequence", "global", "rank")
ALL_TO_TWO = torch.tensor([[0, 1]]).expand(2 * LENGTH, 2)


def plan_of(
    experts_TK: Tensor, config: CapacityConfig, weights_TK: Tensor | None = None, valid_BS: Tensor | None = None
) -> Plan:
    capacity = Capacity(config, EXPERTS, experts_TK.shape[1])
    context = context_of(len(experts_TK) // LENGTH, LENGTH, valid_BS)
    return capacity.plan(routing_to(experts_TK, EXPERTS, weights_TK), context, training=True)


def factor(value: float, **fields: Any) -> FactorCapacityConfig:
    return FactorCapacityConfig(factor=value, **fields)


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "expected"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 8, 2, 4, 5),
        (1.1, 8, 2, 4, 5),
        (1.0, 7, 1, 4, 2),
        (0.01, 8, 1, 4, 1),
        (1.0, 1, 1, 64, 1),
        (100.0, 8, 2, 4, 8),
        (1.0, 0, 2, 4, 0),
    ],
)
def test_trap_25_the_limit_is_rounded_up_at_least_one_and_at_most_the_tokens(
    factor: float, tokens: int, top_k: int, experts: int, expected: int
) -> None:
    assert Limit(factor, top_k, experts).of(tokens) == expected


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 8), st.integers(1, 8), st.integers(1, 200), st.integers(1, 9), st.integers(1, 8))
def test_limits_in_tensors_are_those_of_python(
    value: float, top_k: int, places: int, minimum: int, per_token: int
) -> None:
    limit = Limit(value, top_k, places, per_token, minimum)
    counts = torch.arange(0, 3000, 7)
    assert limit.of_each(counts).tolist() == [limit.of(n) for n in counts.tolist()]


def test_the_minimum_holds_as_far_as_there_are_tokens() -> None:
    assert Capacity(factor(0.1, minimum=3), EXPERTS, 2).limit(training=True).of(LENGTH) == 3
    assert Capacity(factor(0.1, minimum=30), EXPERTS, 2).limit(training=True).of(LENGTH) == LENGTH


def test_trap_27_the_defaults_are_values_that_the_code_accepts() -> None:
    for config in (FactorCapacityConfig(), DeviceCapacityConfig()):
        assert plan_of(ALL_TO_TWO, config).kept_TK.any()


def test_evaluation_has_a_limit_of_its_own() -> None:
    assert Capacity(factor(1.0), EXPERTS, 2).limit(training=False) is None
    assert Capacity(factor(1.0, eval_factor=2.0), EXPERTS, 2).limit(training=False).factor == 2.0
    assert Capacity(DroplessConfig(), EXPERTS, 2).limit(training=True) is None
    assert Capacity(DeviceCapacityConfig(devices=2), EXPERTS, 2).limit(training=False) is None


@pytest.mark.parametrize("scope", SCOPES)
def test_trap_26_drop_by_position_keeps_the_earliest_tokens(scope: str) -> None:
    """Six candidates for one expert with room for three."""
    config = factor(3 * EXPERTS / LENGTH, scope=scope)
    plan = plan_of(torch.zeros(LENGTH, 1, dtype=torch.int64), config)
    assert plan.kept_TK.flatten().tolist() == [True] * 3 + [False] * 3


def test_each_sequence_has_room_of_its_own() -> None:
    kept_BS = plan_of(ALL_TO_TWO, factor(1.0)).kept_TK[:, 0].view(2, LENGTH)
    assert kept_BS.tolist() == [[True] * 3 + [False] * 3] * 2


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_all_sequences_of_a_rank_share_their_room(scope: str) -> None:
    kept_BS = plan_of(ALL_TO_TWO, factor(1.0, scope=scope)).kept_TK[:, 0].view(2, LENGTH)
    assert kept_BS.tolist() == [[True] * LENGTH, [False] * LENGTH]


def padded_in_between(routing: Routing) -> tuple[Routing, Tensor]:
    """The same tokens, each followed by one of padding that wants the most popular expert with all its weight."""
    valid_T = torch.arange(2 * len(routing.experts_TK)) % 2 == 0
    tables = {
        field.name: getattr(routing, field.name).repeat_interleave(2, dim=0)
        for field in dataclasses.fields(Routing)
        if isinstance(getattr(routing, field.name), Tensor)
    }
    tables["weights_TK"] = torch.where(valid_T.unsqueeze(1), tables["weights_TK"], 10.0)
    tables["experts_TK"] = torch.where(valid_T.unsqueeze(1), tables["experts_TK"], torch.tensor([0, 1]))
    return Routing(**tables, weigh=lambda experts_TK: tables["weights_TK"]), valid_T


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", ["position", "probability", "reroute", "device"])
def test_trap_13_padding_has_no_effect_on_capacity(scope: str, rule: str) -> None:
    config: CapacityConfig = DeviceCapacityConfig(scope=scope, devices=2, exempt_fraction=0.0, factor=0.8)
    if rule != "device":
        policy = "position" if rule == "reroute" else rule
        config = factor(0.8, scope=scope, policy=policy, reroute=rule == "reroute")
    capacity, batch = Capacity(config, EXPERTS, 2), 3
    routing = random_routing(batch * LENGTH, EXPERTS, 2, seed=0, dtype=torch.float64)
    plain = capacity.plan(routing, context_of(batch, LENGTH), training=True)
    longer, valid_T = padded_in_between(routing)
    padded = capacity.plan(longer, context_of(batch, 2 * LENGTH, valid_T.view(batch, -1)), training=True)
    assert not plain.kept_TK.all()
    assert torch.equal(padded.kept_TK[valid_T], plain.kept_TK)
    assert torch.equal(padded.experts_TK[valid_T], plain.experts_TK)
    assert not padded.kept_TK[~valid_T].any()


RULES = st.builds(
    FactorCapacityConfig,
    factor=st.sampled_from([0.2, 0.6, 1.0, 1.7]),
    minimum=st.sampled_from([1, 3]),
    scope=st.sampled_from(SCOPES),
    policy=st.sampled_from(POLICIES),
    order=st.sampled_from(ORDERS),
) | st.builds(
    DeviceCapacityConfig,
    factor=st.sampled_from([0.4, 1.0]),
    devices=st.sampled_from([1, 2, 4, 8]),
    exempt_fraction=st.sampled_from([0.0, 0.4]),
    scope=st.sampled_from(SCOPES),
)


@settings(max_examples=150, deadline=None)
@given(RULES, st.integers(0, 1000))
def test_every_rule_equals_plain_loops(config: CapacityConfig, seed: int) -> None:
    routing, context = batch_of(config, seed)
    plan = Capacity(config, 8, 2).plan(routing, context, training=True)
    assert torch.equal(plan.kept_TK, kept_by_loop(config, routing, context, 8))
    assert torch.equal(plan.weights_TK, routing.weights_TK), "before: weights stay as they are"


@settings(max_examples=80, deadline=None)
@given(RULES, st.integers(0, 1000), st.booleans())
def test_kept_and_dropped_are_all_valid_choices_and_no_queue_exceeds_its_limit(
    config: CapacityConfig, seed: int, reroute: bool
) -> None:
    if isinstance(config, DeviceCapacityConfig):
        config = config.model_copy(update={"exempt_fraction": 0.0})
    else:
        config = config.model_copy(update={"reroute": reroute})
    routing, context = batch_of(config, seed)
    plan = Capacity(config, 8, 2).plan(routing, context, training=True)
    valid_TK = context.valid_T.unsqueeze(1).expand_as(plan.kept_TK)
    assert (plan.kept_TK <= valid_TK).all()
    devices = config.devices if isinstance(config, DeviceCapacityConfig) else 8
    limit = Capacity(config, 8, 2).limit(training=True)
    groups = range(len(valid_TK) // LENGTH) if config.scope == "sequence" else [slice(None)]
    for group in groups:
        rows = slice(group * LENGTH, (group + 1) * LENGTH) if isinstance(group, int) else group
        load = torch.bincount((plan.experts_TK[rows] // (8 // devices))[plan.kept_TK[rows]], minlength=devices)
        assert load.max() <= limit.of(int(context.valid_T[rows].sum()))


@pytest.mark.parametrize(("policy", "order", "scope"), list(itertools.product(POLICIES, ORDERS, SCOPES)))
def test_more_room_never_drops_more(policy: str, order: str, scope: str) -> None:
    routing = random_routing(4 * LENGTH, EXPERTS, 2, seed=1, dtype=torch.float64)
    rules = [factor(value, policy=policy, order=order, scope=scope) for value in (0.1, 0.7, 1.3, 2.0, 4.0)]
    plans = [Capacity(rule, EXPERTS, 2).plan(routing, context_of(4, LENGTH), training=True) for rule in rules]
    for fewer, more in itertools.pairwise(plans):
        assert (fewer.kept_TK <= more.kept_TK).all()
    assert not plans[0].kept_TK.all()
    assert plans[-1].kept_TK.all()


def test_a_later_token_never_changes_an_earlier_drop() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(LENGTH, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    kept_TK = plan_of(experts_TK, factor(0.7)).kept_TK
    assert not kept_TK.all()
    for t in range(LENGTH):
        for first in range(EXPERTS):
            changed_TK = experts_TK.clone()
            changed_TK[t] = torch.tensor([first, (first + 1) % EXPERTS])
            assert torch.equal(plan_of(changed_TK, factor(0.7)).kept_TK[:t], kept_TK[:t])


def test_choice_order_counts_all_first_choices_before_any_second() -> None:
    """algorithms.md 2.1: pos2 = exclusive count of second choices + the kept first choices of that expert."""
    experts_TK = torch.tensor([[1, 0], [2, 0], [3, 0], [0, 1], [0, 2], [0, 3]])
    room = 3 * EXPERTS / (LENGTH * 2)
    kept_TK = plan_of(experts_TK, factor(room, order="choice")).kept_TK
    assert kept_TK[3:, 0].all(), "the three first choices of expert 0 fill it, though they come later"
    assert not kept_TK[:3, 1].any()
    by_token_TK = plan_of(experts_TK, factor(room, order="token")).kept_TK
    assert by_token_TK[:3, 1].all()
    assert not by_token_TK[3:, 0].any()


def gshard(config: CapacityConfig, num_tokens: int = LENGTH) -> tuple[Routing, Plan]:
    """Top-2 of random scores, which the router has normalised."""
    logits_TE = torch.randn(num_tokens, EXPERTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    routing = routing_of(logits_TE, 2, kind="gshard")
    return routing, Capacity(config, EXPERTS, 2).plan(routing, context_of(1, num_tokens), training=True)


def test_gshard_with_capacity_for_a_whole_sequence_drops_nothing_and_weights_sum_to_one() -> None:
    _, plan = gshard(factor(EXPERTS / 2, order="choice"))
    assert Limit(EXPERTS / 2, 2, EXPERTS).of(LENGTH) == LENGTH
    assert plan.kept_TK.all()
    assert torch.allclose(plan.weights_TK.sum(dim=1), torch.ones(LENGTH, dtype=torch.float64), rtol=0, atol=1e-8)


def test_gshard_normalises_before_dropping_and_survivors_stay_below_one_after_it_they_are_one() -> None:
    _, before = gshard(factor(0.5, order="choice"))
    _, after = gshard(factor(0.5, order="choice", renormalize="after"))
    one_T = before.kept_TK.sum(dim=1) == 1
    assert one_T.any()
    assert torch.equal(before.kept_TK, after.kept_TK)
    assert ((before.weights_TK * before.kept_TK).sum(dim=1)[one_T] < 1 - 1e-3).all()
    survivors = (after.weights_TK * after.kept_TK).sum(dim=1)[one_T]
    assert torch.allclose(survivors, torch.ones_like(survivors), rtol=0, atol=1e-8)


def test_renormalising_gives_the_survivor_what_the_dropped_one_would_have_had() -> None:
    weights_TK = torch.tensor([[0.6, 0.1]], dtype=torch.float64).repeat(LENGTH, 1).requires_grad_()
    plan = plan_of(ALL_TO_TWO[:LENGTH], factor(1.0, order="choice", renormalize="after"), weights_TK)
    assert torch.equal(plan.weights_TK, weights_TK), "a token of which nothing is kept stays"
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0], [2, 0], [3, 0]])
    plan = plan_of(experts_TK, factor(1.0, renormalize="after"), weights_TK)
    assert plan.kept_TK.tolist() == [[True, True]] * 3 + [[True, False]] * 3
    assert torch.equal(plan.weights_TK[:3], weights_TK[:3])
    assert torch.allclose(plan.weights_TK[3:, 0], torch.tensor(0.7, dtype=torch.float64), rtol=0, atol=1e-15)
    (gradient_TK,) = torch.autograd.grad((plan.weights_TK * plan.kept_TK).sum(), weights_TK)
    assert torch.allclose(gradient_TK, torch.ones_like(gradient_TK), rtol=0, atol=1e-15), "also by way of the dropped"


@pytest.mark.parametrize("survivor", [0.0, 1e-40])
@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_survivors_that_weigh_nothing_are_not_scaled_to_infinity(survivor: float, dropped: float) -> None:
    weights_TK = torch.tensor([[survivor, dropped]]).repeat(LENGTH, 1).requires_grad_()
    experts_TK = torch.tensor([[1, 0], [2, 0], [3, 0], [1, 0], [2, 0], [3, 0]])
    plan = plan_of(experts_TK, factor(1.0, renormalize="after"), weights_TK)
    assert plan.kept_TK[3:].tolist() == [[True, False]] * 3
    (plan.weights_TK * plan.kept_TK).sum().backward()
    assert torch.equal(plan.weights_TK, weights_TK)
    assert weights_TK.grad.isfinite().all()


def test_a_rerouted_choice_has_the_weight_of_the_expert_that_takes_it_normalised_over_the_new_choices() -> None:
    routing = random_routing(4 * LENGTH, EXPERTS, 2, seed=1, dtype=torch.float64)
    capacity = Capacity(factor(0.7, reroute=True), EXPERTS, 2)
    plan = capacity.plan(routing, context_of(4, LENGTH), training=True)
    assert plan.rerouted_TK.any()
    for t, row in enumerate(plan.experts_TK.tolist()):
        expected_K = routing.logits_TE[t, row].exp() / routing.logits_TE[t, row].exp().sum()
        assert torch.allclose(plan.weights_TK[t], expected_K, rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", [DroplessConfig(), factor(1.0), DeviceCapacityConfig(devices=2)])
@pytest.mark.parametrize("mask", ["declined_TK", "chosen_TK"])
def test_what_the_router_itself_gave_up_takes_no_room(config: CapacityConfig, mask: str) -> None:
    """All want experts 0 and 1; the first three tokens give both choices up, and three others fit."""
    given_up_TK = (torch.arange(LENGTH) < 3).unsqueeze(1).repeat(1, 2)
    routing = routing_to(ALL_TO_TWO[:LENGTH], EXPERTS)
    routing = dataclasses.replace(routing, **{mask: given_up_TK if mask == "declined_TK" else ~given_up_TK})
    plan = Capacity(config, EXPERTS, 2).plan(routing, context_of(1, LENGTH), training=True)
    assert torch.equal(plan.kept_TK, ~given_up_TK)
    assert not plan.all_kept


def test_the_router_keeps_its_gradient_through_survivors() -> None:
    layer, x_BSD = make_layer(EXPERTS, 2, factor(0.6)), tokens(2, LENGTH)
    layer(x_BSD).y_BSD.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3


def random_kept(seed: int, batch: int, first: int) -> Tensor:
    """Every token wants expert 0, which has room for half a sequence."""
    config = factor(EXPERTS / 2, policy="random")
    routing = routing_to(torch.zeros(batch * LENGTH, 1, dtype=torch.int64), EXPERTS)
    return Capacity(config, EXPERTS, 1).plan(routing, context_of(batch, LENGTH, seed=seed, first=first), True).kept_TK


def test_the_random_policy_is_the_same_whoever_holds_the_tokens_and_another_in_each_step() -> None:
    whole_TK = random_kept(seed=7, batch=8, first=0)
    parts = [random_kept(seed=7, batch=2, first=first) for first in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole_TK)
    assert not torch.equal(random_kept(seed=8, batch=8, first=0), whole_TK)
    kept_BS = whole_TK.view(8, LENGTH)
    assert (kept_BS.sum(dim=1) == LENGTH // 2).all()
    assert len({tuple(row) for row in kept_BS.tolist()}) > 4, "sequences draw numbers of their own"


def test_the_random_policy_is_fair_to_positions() -> None:
    kept_S = random_kept(seed=3, batch=600, first=0).view(600, LENGTH).sum(dim=0)
    assert ((kept_S - 300).abs() < 4 * (600 * 0.25) ** 0.5).all()


def test_evaluation_draws_nothing() -> None:
    config = factor(1.0, eval_factor=2.0, policy="random")
    routing = routing_to(torch.zeros(LENGTH, 1, dtype=torch.int64), EXPERTS)
    plan = Capacity(config, EXPERTS, 1).plan(routing, context_of(1, LENGTH, seed=5), training=False)
    assert plan.kept_TK.flatten().tolist() == [True] * 3 + [False] * 3


def test_trap_30_dropped_tokens_contribute_nothing_and_are_reported() -> None:
    layer, x_BSD = make_layer(EXPERTS, 1, factor(0.5), "none"), tokens(3, LENGTH)
    torch.nn.init.zeros_(layer.router.weight)  # everybody chooses expert 0, which takes one token per sequence
    output = layer(x_BSD)
    assert torch.equal(output.y_BSD[:, 1:], torch.zeros(3, LENGTH - 1, x_BSD.shape[2], dtype=torch.float64))
    assert output.y_BSD[:, 0].abs().min() > 0
    assert output.record.dropped_capacity.item() == 3 * (LENGTH - 1)
    assert output.record.counts_E.tolist() == [3 * LENGTH, 0, 0, 0]


def test_surviving_weights_are_not_renormalised_by_default() -> None:
    layer, x_BSD = make_layer(EXPERTS, 2, factor(0.6)), tokens(2, LENGTH)
    context = context_of(2, LENGTH)
    kept_TK = layer.capacity.plan(layer.router(x_BSD.flatten(0, 1), context), context, training=True).kept_TK
    assert (kept_TK.sum(dim=1) == 1).any(), "the case needs a token that keeps one of its two choices"
    expected_TD = plain_loop(layer, x_BSD.flatten(0, 1), kept_TK)
    assert torch.allclose(layer(x_BSD).y_BSD.flatten(0, 1), expected_TD, rtol=0, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_no_rule_but_rerouting_waits_for_the_device(training: bool) -> None:
    rules: list[CapacityConfig] = [DeviceCapacityConfig(devices=2)]
    for policy, order, scope in itertools.product(POLICIES, ORDERS, SCOPES):
        rules.append(factor(1.0, eval_factor=1.5, policy=policy, order=order, scope=scope, pad=scope != "global"))
    for config in rules:
        routing, context = batch_of(config, seed=1)
        with NoWaiting():
            Capacity(config, 8, 2).plan(routing, context, training)


def test_slots_give_every_kept_choice_a_place_of_its_own_in_the_run_of_its_expert() -> None:
    for scope, reroute in itertools.product(("sequence", "rank"), (False, True)):
        config = factor(0.7, pad=True, scope=scope, reroute=reroute)
        assert is_padded(config)
        assert not is_padded(DroplessConfig())
        routing, context = batch_of(config, seed=2)
        plan = Capacity(config, 8, 2).plan(routing, context, training=True)
        per_expert = plan.slots.per_expert
        limit = Capacity(config, 8, 2).limit(training=True)
        assert per_expert == (4 * limit.of(LENGTH) if scope == "sequence" else limit.of(4 * LENGTH))
        kept = plan.slots.slots_TK[plan.kept_TK]
        assert len(set(kept.tolist())) == len(kept)
        assert torch.equal(kept // per_expert, plan.experts_TK[plan.kept_TK])
        assert (plan.slots.slots_TK[~plan.kept_TK] == 8 * per_expert).all()


def test_evaluation_without_limit_has_no_slots() -> None:
    routing, context = batch_of(factor(1.0, pad=True), seed=2)
    assert Capacity(factor(1.0, pad=True), 8, 2).plan(routing, context, training=False).slots is None
