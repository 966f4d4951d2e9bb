"""Noisy top-k gating. Its published numbers are in tests/golden."""

import math

import pytest
import torch
from routing_cases import DIM, EXPERTS, ROUTERS, context_of, ffn_of, random, router_of
from torch import Tensor, nn

from moe_train.models.initialise import initialise
from moe_train.moe.context import Purpose
from moe_train.moe.routers import build_router

NOISY = ROUTERS["noisy_topk"]
TOKENS = 60


def noise(top_k: int = 2) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A router, its scores without and with noise, and the deviation of the noise, formed here."""
    router, x_TD, context = router_of(ffn_of("noisy_topk", EXPERTS, top_k), training=True), tokens(), context_of(6, 10)
    spread_TE = (1 + (x_TD @ router.noise.T).exp()).log()
    u_TE = context.uniform(Purpose.NOISE, EXPERTS).double()
    eps_TE = math.sqrt(2) * torch.erfinv(2 * u_TE - 1)
    z_TE = x_TD @ router.weight.T
    return router, z_TE, z_TE + eps_TE * spread_TE, spread_TE


def tokens() -> Tensor:
    return random(TOKENS, DIM, seed=8)


def test_both_weights_start_at_zero_so_that_choices_are_noise_of_deviation_log_2() -> None:
    router = build_router(NOISY, DIM, init_std=0.5).double().train()
    initialise(router, seed=0)
    assert {name: value.abs().max().item() for name, value in router.named_parameters()} == {"weight": 0, "noise": 0}
    num = 5000
    routing = router(random(num, DIM), context_of(50, 100))
    assert torch.equal(routing.logits_TE, torch.zeros_like(routing.logits_TE))
    found = routing.ranking_TE.std().item()
    assert found == pytest.approx(math.log(2), rel=3 / math.sqrt(2 * num * EXPERTS))
    counts_E = torch.bincount(routing.experts_TK.flatten(), minlength=EXPERTS).double()
    chance = 2 / EXPERTS
    assert ((counts_E - num * chance).abs() < 4 * math.sqrt(num * chance * (1 - chance))).all(), "even load"


def test_the_choice_is_by_the_noisy_scores_and_the_weights_are_their_softmax() -> None:
    router, z_TE, noisy_TE, _ = noise()
    routing = router(tokens(), context_of(6, 10))
    assert torch.allclose(routing.ranking_TE, noisy_TE, rtol=0, atol=1e-6), "erfinv and ndtri differ a little"
    assert torch.equal(routing.experts_TK, routing.ranking_TE.topk(2, dim=1).indices)
    expected_TK = noisy_TE.gather(1, routing.experts_TK).softmax(dim=1)
    assert torch.allclose(routing.weights_TK, expected_TK, rtol=0, atol=1e-6)
    assert torch.allclose(routing.probabilities_TE, z_TE.softmax(dim=1), rtol=0, atol=1e-14), "of raw scores"
    assert torch.allclose(routing.logits_TE, z_TE, rtol=0, atol=1e-14), "the z-loss is of raw scores"


@pytest.mark.parametrize("top_k", [1, 2, 5, EXPERTS - 1])
def test_the_load_is_measured_against_the_kth_score_of_the_others(top_k: int) -> None:
    router, z_TE, _, spread_TE = noise(top_k)
    routing = router(tokens(), context_of(6, 10))
    for t, row in enumerate(routing.ranking_TE.tolist()):
        for e in range(EXPERTS):
            threshold = sorted((h for other, h in enumerate(row) if other != e), reverse=True)[top_k - 1]
            expected = 0.5 * math.erfc(-((z_TE[t, e] - threshold) / spread_TE[t, e]).item() / math.sqrt(2))
            assert routing.load_TE[t, e].item() == pytest.approx(expected, abs=1e-12)


def test_the_load_trains_the_noise() -> None:
    router = router_of(NOISY, training=True)
    load_E = router(tokens(), context_of(6, 10)).load_TE.sum(dim=0)
    (load_E.var(correction=0) / load_E.mean().square()).backward()
    assert router.noise.grad.abs().max() > 1e-4
    assert router.weight.grad.abs().max() > 1e-4


def test_evaluation_has_no_noise_and_no_load() -> None:
    router = router_of(NOISY)
    routing = router(tokens(), context_of(6, 10))
    z_TE = tokens() @ router.weight.T
    assert routing.load_TE is None
    assert torch.allclose(routing.ranking_TE, z_TE, rtol=0, atol=1e-14)
    assert torch.allclose(routing.weights_TK, z_TE.gather(1, routing.experts_TK).softmax(dim=1), rtol=0, atol=1e-14)


def test_with_all_experts_chosen_there_is_no_load() -> None:
    router = router_of(ffn_of("noisy_topk", EXPERTS, EXPERTS), training=True)
    assert router(tokens(), context_of(6, 10)).load_TE is None, "there is no (K + 1)-th score"


def test_the_load_is_a_count_only_in_expectation() -> None:
    """Its sum is near T · K, not equal to it."""
    router = router_of(NOISY, training=True)
    num = 4000
    total = router(random(num, DIM), context_of(40, 100)).load_TE.sum().item()
    assert total == pytest.approx(2 * num, rel=0.05)
    assert total != 2 * num
