"""What must hold of capacity and balance for every routing."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.routing import FactorCapacityConfig
from moe_train.dist.peers import Alone
from moe_train.moe.capacity import Capacity, Plan, renormalized
from moe_train.moe.context import RoutingContext
from moe_train.moe.losses import balance_sum
from moe_train.moe.queues import Queues, admitted_reference
from moe_train.moe.routing import Routing

QUICK = settings(max_examples=80, deadline=None)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Routing, RoutingContext, FactorCapacityConfig, Plan]:
    """A random routing, its padding, a rule, and the plan."""
    batch, length, experts = (draw(st.integers(1, high)) for high in (3, 6, 5))
    top_k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits_TE = torch.randn(batch * length, experts, generator=generator, dtype=torch.float64)
    experts_TK = logits_TE.argsort(dim=1, descending=True)[:, :top_k]
    valid = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))

    def weigh(experts_TK: torch.Tensor) -> torch.Tensor:
        return logits_TE.gather(1, experts_TK).softmax(dim=1)

    routing = Routing(logits_TE, logits_TE.softmax(dim=1), logits_TE, experts_TK, weigh(experts_TK), weigh)
    config = FactorCapacityConfig(
        factor=draw(st.sampled_from([0.3, 0.8, 1.0, 1.25, 2.0])),
        scope=draw(st.sampled_from(["sequence", "rank", "global"])),
        policy=draw(st.sampled_from(["position", "probability", "random"])),
        order=draw(st.sampled_from(["token", "choice"])),
        reroute=draw(st.booleans()),
        renormalize=draw(st.sampled_from(["before", "after"])),
    )
    context = RoutingContext.of(torch.zeros(batch, length, dtype=torch.int64), torch.tensor(valid).view(batch, length))
    return routing, context, config, Capacity(config, experts, top_k).plan(routing, context, training=True)


@QUICK
@given(plans())
def test_no_token_visits_an_expert_twice_and_padding_visits_none(
    case: tuple[Routing, RoutingContext, FactorCapacityConfig, Plan],
) -> None:
    _, context, _, plan = case
    assert not plan.kept_TK[~context.valid_T].any()
    for row in plan.experts_TK.tolist():
        assert len(set(row)) == len(row)


@QUICK
@given(plans())
def test_an_assignment_is_refused_only_by_a_full_expert(
    case: tuple[Routing, RoutingContext, FactorCapacityConfig, Plan],
) -> None:
    routing, context, config, plan = case
    num_experts = routing.logits_TE.shape[1]
    limit = Capacity(config, num_experts, routing.experts_TK.shape[1]).limit(training=True)
    group_T = torch.arange(context.num_tokens) // context.length
    if config.scope != "sequence":
        group_T = torch.zeros_like(group_T)
    for group in group_T.unique().tolist():
        valid_T = context.valid_T & (group_T == group)
        load_E = torch.bincount(plan.experts_TK[(group_T == group)][plan.kept_TK[group_T == group]], minlength=99)
        missing_TK = valid_T.unsqueeze(1) & ~plan.kept_TK
        assert (load_E[plan.experts_TK[missing_TK]] == limit.of(int(valid_T.sum()))).all()


@QUICK
@given(plans())
def test_renormalising_keeps_the_sum_of_a_token_that_keeps_something(
    case: tuple[Routing, RoutingContext, FactorCapacityConfig, Plan],
) -> None:
    routing, context, _, plan = case
    weights_TK = routing.weigh(plan.experts_TK)
    wanted_TK = context.valid_T.unsqueeze(1).expand_as(plan.kept_TK)
    after_TK = renormalized(weights_TK, wanted_TK, plan.kept_TK)
    some_T = plan.kept_TK.any(dim=1)
    assert torch.allclose((after_TK * plan.kept_TK).sum(dim=1)[some_T], weights_TK.sum(dim=1)[some_T], atol=1e-14)
    all_T = plan.kept_TK.all(dim=1)
    assert torch.equal(after_TK[all_T], weights_TK[all_T])


@QUICK
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_by_position_a_prefix_of_every_queue_is_kept(seed: int, limit: int) -> None:
    experts_TK = torch.randint(4, (12, 2), generator=torch.Generator().manual_seed(seed))
    limits_Q = torch.full((4,), limit)
    queues = Queues(torch.zeros(12, dtype=torch.int64), 4, limits_Q, Alone())
    kept_TK = queues.admitted(experts_TK, torch.ones_like(experts_TK, dtype=torch.bool), None)
    assert torch.equal(kept_TK, admitted_reference(experts_TK, limits_Q, torch.zeros_like(experts_TK)))
    for expert in range(4):
        queue = kept_TK[experts_TK == expert].tolist()
        assert queue == sorted(queue, reverse=True)


@QUICK
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30))
def test_even_load_or_even_probabilities_cost_one(experts: int, tokens: int, top_k: int) -> None:
    """E·Σ f·P is 1 as soon as one of the two is even, whatever the other is."""
    even_E, mass_E = torch.full((experts,), tokens * top_k), torch.rand(experts, dtype=torch.float64) + 0.1
    mass_E = mass_E * tokens / mass_E.sum()
    assert math.isclose(balance_sum(even_E, mass_E).item(), tokens, rel_tol=1e-12)
    counts_E = torch.randint(0, 9, (experts,)) + 1
    even_mass_E = torch.full((experts,), tokens / experts, dtype=torch.float64)
    assert math.isclose(balance_sum(counts_E, even_mass_E).item(), tokens, rel_tol=1e-12)
