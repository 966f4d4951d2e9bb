"""Expert choice without knowledge of later tokens: thresholds, how they move, and what they leave unknown."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import DIM, EXPERTS, ROUTERS, context_of, ffn_of, random, router_of
from torch import Tensor, nn

from moe_train.models.initialise import initialise
from moe_train.moe.foresight import foresighted, looking_ahead
from moe_train.moe.routers.expert_choice import ExpertChoiceRouter

LENGTH = 12
CHOICE = ROUTERS["expert_choice"]


def causal_router(**changes: object) -> nn.Module:
    """In evaluation, with thresholds that some tokens exceed."""
    router = router_of(ffn_of("expert_choice", EXPERTS, 2, allow_future_leak=True, **changes))
    router.threshold_E.copy_(torch.linspace(0.15, 0.5, EXPERTS))
    return router


@settings(max_examples=30, deadline=None)
@given(st.integers(1, LENGTH - 1), st.integers(0, 10**6))
def test_the_choice_of_a_token_is_independent_of_later_ones(position: int, seed: int) -> None:
    router = causal_router()
    one_TD, two_TD = random(LENGTH, DIM, seed=seed), random(LENGTH, DIM, seed=seed + 1)
    two_TD[:position] = one_TD[:position]
    chosen = [router(x_TD, context_of(1, LENGTH)).chosen_TK[:position] for x_TD in (one_TD, two_TD)]
    assert torch.equal(*chosen)
    alone = router(one_TD[:position], context_of(1, position)).chosen_TK
    assert torch.equal(alone, chosen[0]), "a text that goes on, or ends"


def test_it_is_not_when_it_looks_ahead() -> None:
    """The property above can fail."""
    router = causal_router()
    one_TD, two_TD = random(LENGTH, DIM), random(LENGTH, DIM, seed=1)
    two_TD[:6] = one_TD[:6]
    with looking_ahead(router):
        chosen = [router(x_TD, context_of(1, LENGTH)).chosen_TK[:6] for x_TD in (one_TD, two_TD)]
    assert not torch.equal(*chosen)


def test_an_expert_takes_what_exceeds_its_threshold() -> None:
    router, x_TD = causal_router(), random(3 * LENGTH, DIM)
    routing = router(x_TD, context_of(3, LENGTH))
    assert torch.equal(routing.chosen_TK, routing.probabilities_TE > router.threshold_E)
    assert {0} < set(routing.chosen_TK.sum(dim=1).tolist()), "some tokens get no expert, others do"
    assert routing.last_BE is None, "evaluation teaches nothing"


def test_looking_ahead_is_what_training_does() -> None:
    router, x_TD = causal_router(), random(3 * LENGTH, DIM)
    context = context_of(3, LENGTH)
    in_training = router.train()(x_TD, context).chosen_TK
    router.eval()
    assert not torch.equal(router(x_TD, context).chosen_TK, in_training)
    with looking_ahead(router):
        assert torch.equal(router(x_TD, context).chosen_TK, in_training)
    assert foresighted(router) == [router] and not router.looks_ahead


def test_padding_is_not_taken() -> None:
    valid_BS = torch.arange(LENGTH).unsqueeze(0) < 5
    chosen_TK = causal_router()(random(LENGTH, DIM), context_of(1, LENGTH, valid_BS=valid_BS)).chosen_TK
    assert chosen_TK[:5].any() and not chosen_TK[5:].any()


def test_before_the_first_step_a_threshold_is_the_score_of_a_router_that_prefers_nobody() -> None:
    router, x_TD = router_of(CHOICE), random(LENGTH, DIM)
    initialise(router, seed=0)
    assert (router.threshold_E == 0).all() and "threshold_E" in router.state_dict()
    routing = router(x_TD, context_of(1, LENGTH))
    assert torch.equal(routing.chosen_TK, routing.probabilities_TE > 1 / EXPERTS)


@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 5, 1), (12, 0, 7)])
def test_what_travels_is_the_score_of_the_last_token_taken(lengths: tuple[int, ...]) -> None:
    router = router_of(CHOICE, training=True)
    valid_BS = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    routing = router(random(3 * LENGTH, DIM), context_of(3, LENGTH, valid_BS=valid_BS))
    for b, n in enumerate(lengths):
        scores_NE = routing.probabilities_TE.view(3, LENGTH, EXPERTS)[b, :n]
        kth_E = scores_NE.sort(dim=0, descending=True).values[max(1, n * 2 // EXPERTS) - 1] if n else torch.inf
        assert torch.equal(routing.last_BE[b], torch.as_tensor(kth_E).expand(EXPERTS).to(routing.last_BE))


def moved(steps: list[tuple[Tensor, Tensor]], decay: float) -> Tensor:
    """Thresholds after some steps, of a router that had none."""
    router = router_of(ffn_of("expert_choice", EXPERTS, 2, allow_future_leak=True, decay=decay))
    assert isinstance(router, ExpertChoiceRouter)
    for sum_E, sequences_E in steps:
        router.move_threshold(sum_E, sequences_E)
    return router.threshold_E


def test_thresholds_start_with_the_first_step_and_decay_to_later_ones() -> None:
    first_E, second_E = random(EXPERTS).abs(), random(EXPERTS, seed=1).abs()
    four_E = torch.full((EXPERTS,), 4)
    torch.testing.assert_close(moved([(4 * first_E, four_E)], 0.9), first_E)
    both_E = moved([(4 * first_E, four_E), (4 * second_E, four_E)], 0.9)
    torch.testing.assert_close(both_E, 0.9 * first_E + 0.1 * second_E)


def test_an_expert_that_took_nothing_keeps_its_threshold() -> None:
    first_E, some_E = random(EXPERTS).abs(), torch.arange(EXPERTS) % 2
    after_E = moved([(first_E, torch.ones(EXPERTS)), (torch.full_like(first_E, 0.5) * some_E, some_E)], 0.5)
    torch.testing.assert_close(after_E, torch.where(some_E == 1, (first_E + 0.5) / 2, first_E))


def test_thresholds_of_steady_scores_take_as_many_tokens_as_training_does() -> None:
    """What they are learnt for: on average K experts per token."""
    router, context = router_of(CHOICE, training=True), context_of(64, 64)
    for seed in range(20):
        last_BE = router(random(64 * 64, DIM, seed=seed), context).last_BE
        router.move_threshold(last_BE.sum(dim=0), torch.full((EXPERTS,), 64))
    taken = router.eval()(random(64 * 64, DIM, seed=99), context).chosen_TK.double().sum(dim=1).mean()
    assert taken.item() == pytest.approx(2.0, rel=0.06)
