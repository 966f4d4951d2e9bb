"""GShard's top-2: the second choice greedy or drawn, given up at random, weights normalised before any drop."""

import math

import pytest
import torch
from routing_cases import EXPERTS, at_logits, context_of, ffn_of, random

from moe_train.moe.context import Purpose

GREEDY = ffn_of("gshard", EXPERTS, 2)
SAMPLED = ffn_of("gshard", EXPERTS, 2, second="sampled")
DECLINING = ffn_of("gshard", EXPERTS, 2, dispatch_threshold=0.5)
TOKENS = 20_000


def test_weights_are_the_two_probabilities_over_their_sum() -> None:
    z_TE = random(200, EXPERTS)
    routing = at_logits(GREEDY, z_TE, training=True)
    p_TE = z_TE.softmax(dim=1)
    assert torch.equal(routing.experts_TK, p_TE.sort(dim=1, descending=True, stable=True).indices[:, :2])
    chosen_TK = p_TE.gather(1, routing.experts_TK)
    assert torch.allclose(routing.weights_TK, chosen_TK / (chosen_TK.sum(dim=1, keepdim=True) + 1e-9), rtol=1e-14)
    assert torch.allclose(routing.weights_TK.sum(dim=1), torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("ffn", [GREEDY, SAMPLED, DECLINING], ids=["greedy", "sampled", "declining"])
def test_the_load_is_of_first_choices_only(ffn: object) -> None:
    """lingvo: f_e is the fraction with first choice e, before capacity."""
    routing = at_logits(ffn, random(200, EXPERTS), training=True)
    assert torch.equal(routing.counted_TM, routing.experts_TK[:, :1])


def test_a_sampled_second_is_never_the_first_and_differs_with_the_seed() -> None:
    z_TE = random(1000, EXPERTS)
    one, two = (at_logits(SAMPLED, z_TE, context_of(10, 100, seed), training=True) for seed in (1, 2))
    assert torch.equal(one.experts_TK[:, 0], z_TE.argmax(dim=1)), "the first is not drawn"
    assert torch.equal(two.experts_TK[:, 0], z_TE.argmax(dim=1))
    assert (one.experts_TK[:, 1] != one.experts_TK[:, 0]).all()
    share_that_differs = (one.experts_TK[:, 1] != two.experts_TK[:, 1]).double().mean()
    assert share_that_differs > 0.4


def test_a_sampled_second_is_drawn_with_its_probability_among_the_others() -> None:
    z_E = torch.tensor([0.5, 2.0, 1.0, -1.0, 0.0, 1.5, -2.0, 0.2], dtype=torch.float64)
    routing = at_logits(SAMPLED, z_E.expand(TOKENS, -1), context_of(200, 100), training=True)
    assert (routing.experts_TK[:, 0] == 1).all()
    expected_E = z_E.scatter(0, torch.tensor([1]), -math.inf).softmax(dim=0)
    found_E = torch.bincount(routing.experts_TK[:, 1], minlength=EXPERTS) / TOKENS
    sigma_E = (expected_E * (1 - expected_E) / TOKENS).sqrt()
    assert found_E[1] == 0
    assert ((found_E - expected_E).abs() <= 3 * sigma_E).all()


def test_a_sampled_second_is_greedy_in_evaluation() -> None:
    z_TE = random(200, EXPERTS)
    assert torch.equal(at_logits(SAMPLED, z_TE).experts_TK, at_logits(GREEDY, z_TE).experts_TK)


@pytest.mark.parametrize("second_logit", [-4.0, -2.0, -1.0])
def test_a_second_choice_is_kept_with_its_weight_over_the_threshold(second_logit: float) -> None:
    """Kept with probability min(1, g2 / threshold), GShard's 2 · g2 > u at a threshold of one half."""
    z_E = torch.full((EXPERTS,), -30.0, dtype=torch.float64)
    z_E[3], z_E[6] = 0.0, second_logit
    routing = at_logits(DECLINING, z_E.expand(TOKENS, -1), context_of(200, 100), training=True)
    weight = 1 / (1 + math.exp(-second_logit))
    chance = min(1.0, weight / 0.5)
    assert routing.weights_TK[0, 1].item() == pytest.approx(weight, abs=1e-8)
    kept = 1.0 - routing.declined_TK[:, 1].double().mean().item()
    assert abs(kept - chance) < 3 * math.sqrt(chance * (1 - chance) / TOKENS)
    assert not routing.declined_TK[:, 0].any(), "a first choice is never given up"


def test_a_second_choice_above_the_threshold_is_always_kept() -> None:
    routing = at_logits(DECLINING, torch.zeros(2000, EXPERTS, dtype=torch.float64), training=True)
    assert not routing.declined_TK.any(), "two equal choices weigh one half each"


def test_nothing_is_given_up_in_evaluation_or_without_a_threshold() -> None:
    z_TE = random(200, EXPERTS)
    assert at_logits(DECLINING, z_TE).declined_TK is None
    assert at_logits(GREEDY, z_TE, training=True).declined_TK is None


def test_giving_up_follows_the_draw_and_leaves_the_weights() -> None:
    """The expected weight changes: GShard makes no correction for it."""
    z_TE, context = random(400, EXPERTS), context_of(4, 100, seed=3)
    routing, plain = at_logits(DECLINING, z_TE, context, training=True), at_logits(GREEDY, z_TE, context)
    draws_T = context.uniform(Purpose.DISPATCH, 1).squeeze(1).double()
    assert torch.equal(routing.declined_TK[:, 1], draws_T * 0.5 >= plain.weights_TK[:, 1])
    assert 0.1 < routing.declined_TK[:, 1].double().mean() < 0.9
    assert torch.equal(routing.weights_TK, plain.weights_TK)
