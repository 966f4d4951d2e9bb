"""Routers that take the K best of a score: their weights, the bias on the choice, expert dropout."""

import math

import pytest
import torch
from routing_cases import EXPERTS, ROUTERS, at_logits, context_of, ffn_of, random, router_of, with_router
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.moe.context import Purpose

TOKENS = 40
BIASED = {"loss_free": {}}
BIASED_ROUTERS = {
    "topk": ffn_of("topk", EXPERTS, 2, BIASED),
    "topk_unnormalised": ffn_of("topk", EXPERTS, 2, BIASED, normalize="none"),
    "topk_softmax": ffn_of("topk_softmax", EXPERTS, 2, BIASED),
    "sigmoid": ffn_of("sigmoid", EXPERTS, 2, BIASED),
    "switch": ffn_of("switch", EXPERTS, 1, BIASED),
    "gshard": ffn_of("gshard", EXPERTS, 2, BIASED),
    "group_limited_v3": ffn_of("group_limited", EXPERTS, 3, BIASED),
}
every_biased_router = pytest.mark.parametrize("ffn", BIASED_ROUTERS.values(), ids=BIASED_ROUTERS)


def best(scores_TE: Tensor, top_k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in scores_TE.tolist()]


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("kind", ["topk", "topk_softmax"])
def test_normalised_weights_are_a_softmax_over_the_selected(kind: str, top_k: int) -> None:
    z_TE = random(TOKENS, EXPERTS)
    routing = at_logits(ffn_of(kind, EXPERTS, top_k), z_TE)
    assert routing.experts_TK.tolist() == best(z_TE, top_k)
    p_TK = z_TE.softmax(dim=1).gather(1, routing.experts_TK)
    assert torch.allclose(routing.weights_TK, p_TK / p_TK.sum(dim=1, keepdim=True), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["topk", "switch"])
def test_plain_weights_are_the_probabilities_best_first(kind: str) -> None:
    z_TE = random(TOKENS, EXPERTS)
    top_k = 1 if kind == "switch" else 3
    fields = {} if kind == "switch" else {"normalize": "none"}
    routing = at_logits(ffn_of(kind, EXPERTS, top_k, **fields), z_TE)
    expected_TK = z_TE.softmax(dim=1).sort(dim=1, descending=True).values[:, :top_k]
    assert torch.allclose(routing.weights_TK, expected_TK, rtol=0, atol=1e-15)


def test_sigmoid_scores_do_not_compete() -> None:
    z_TE = random(TOKENS, EXPERTS)
    plain = at_logits(ffn_of("sigmoid", EXPERTS, 3, normalize="none"), z_TE)
    s_TE = 1 / (1 + (-z_TE).exp())
    assert plain.experts_TK.tolist() == best(z_TE, 3)
    assert torch.allclose(plain.weights_TK, s_TE.gather(1, plain.experts_TK), rtol=0, atol=1e-15)
    assert torch.allclose(plain.probabilities_TE, s_TE / s_TE.sum(dim=1, keepdim=True), rtol=0, atol=1e-15)
    louder_TE = z_TE.clone()
    louder_TE[:, 7] += 5.0
    kept_TE = at_logits(ffn_of("sigmoid", EXPERTS, EXPERTS, normalize="none"), louder_TE).weigh(plain.experts_TK)
    untouched_TK = plain.experts_TK != 7
    assert torch.equal(kept_TE[untouched_TK], plain.weights_TK[untouched_TK])
    normalised = at_logits(ffn_of("sigmoid", EXPERTS, 3), z_TE)
    expected_TK = plain.weights_TK / plain.weights_TK.sum(dim=1, keepdim=True)
    assert torch.allclose(normalised.weights_TK, expected_TK, rtol=0, atol=1e-15)


def test_vanishing_sigmoid_scores_give_no_nan() -> None:
    routing = at_logits(ffn_of("sigmoid", EXPERTS, 2), torch.full((3, EXPERTS), -1e4))
    assert torch.equal(routing.weights_TK, torch.zeros(3, 2))
    assert torch.equal(routing.probabilities_TE, torch.zeros(3, EXPERTS))


def test_vanishing_softmax_scores_still_sum_to_one() -> None:
    """A bias may choose experts whose probabilities are zero in the number format: 0 / 0 must not come of it."""
    z_TE = torch.zeros(1, EXPERTS)
    z_TE[0, 0] = 1e4
    bias_E = torch.tensor([-9.0] + [0.0] * (EXPERTS - 1))
    routing = at_logits(BIASED_ROUTERS["topk"], z_TE, bias_E=bias_E)
    assert routing.experts_TK.tolist() == [[1, 2]]
    assert routing.weights_TK.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("kind", ["topk", "topk_softmax"])
def test_top_1_normalised_weights_carry_no_gradient(kind: str) -> None:
    """Why the configuration refuses it: the router would never learn from the task."""
    z_TE = random(TOKENS, EXPERTS).requires_grad_()
    (gradient_TE,) = torch.autograd.grad(at_logits(ffn_of(kind, EXPERTS, 1), z_TE).weights_TK.sum(), z_TE)
    assert gradient_TE.abs().max() < 1e-15
    (gradient_TE,) = torch.autograd.grad(at_logits(ROUTERS["switch"], z_TE).weights_TK.sum(), z_TE)
    assert gradient_TE.abs().max() > 1e-2


# --- the bias of loss-free balancing ---


@every_biased_router
def test_trap_20_the_bias_changes_selection_only(ffn: FFNConfig) -> None:
    """Weights, probabilities and logits are those of the scores without it."""
    z_TE = random(TOKENS, EXPERTS)
    bias_E = 0.5 * random(EXPERTS, seed=3)
    plain, biased = at_logits(ffn, z_TE), at_logits(ffn, z_TE, bias_E=bias_E)
    assert not torch.equal(plain.experts_TK, biased.experts_TK), "or nothing is shown"
    assert torch.equal(biased.weights_TK, plain.weigh(biased.experts_TK))
    assert torch.equal(biased.probabilities_TE, plain.probabilities_TE)
    assert torch.equal(biased.logits_TE, plain.logits_TE)


@every_biased_router
def test_a_constant_added_to_every_bias_changes_nothing(ffn: FFNConfig) -> None:
    z_TE, bias_E = random(TOKENS, EXPERTS), 0.1 * random(EXPERTS, seed=3)
    one, two = at_logits(ffn, z_TE, bias_E=bias_E), at_logits(ffn, z_TE, bias_E=bias_E + 0.75)
    assert torch.equal(one.experts_TK, two.experts_TK)
    assert torch.equal(one.weights_TK, two.weights_TK)


@pytest.mark.parametrize("kind", ["topk", "topk_softmax", "sigmoid"])
def test_the_choice_is_by_score_plus_bias(kind: str) -> None:
    z_TE, bias_E = random(TOKENS, EXPERTS), 0.5 * random(EXPERTS, seed=3)
    scores_TE = z_TE.sigmoid() if kind == "sigmoid" else z_TE.softmax(dim=1)
    assert at_logits(BIASED_ROUTERS[kind], z_TE, bias_E=bias_E).experts_TK.tolist() == best(scores_TE + bias_E, 2)


@every_biased_router
def test_the_balance_losses_count_the_choice_without_bias_and_groups(ffn: FFNConfig) -> None:
    """DeepSeek-V3, eq. 18: f is of the un-biased top-K, not of the load that is dispatched."""
    z_TE = random(TOKENS, EXPERTS)
    counted_TM = at_logits(ffn, z_TE, bias_E=random(EXPERTS, seed=3)).counted_TM
    assert counted_TM is not None
    assert counted_TM.tolist() == best(z_TE, 1 if ffn.router.kind == "gshard" else ffn.top_k)


@every_biased_router
def test_the_bias_gets_no_gradient_and_is_saved(ffn: FFNConfig) -> None:
    router = router_of(ffn, training=True)
    assert "bias_E" in router.state_dict()
    assert "bias_E" not in dict(router.named_parameters())
    routing = router(random(TOKENS, 6), context_of(4, 10))
    (routing.weights_TK.sum() + routing.probabilities_TE.square().sum()).backward()
    assert router.bias_E.grad is None
    assert torch.equal(router.bias_E, torch.zeros(EXPERTS)), "forward leaves it alone, in training too"


def test_without_loss_free_balancing_there_is_no_bias() -> None:
    for ffn in ROUTERS.values():
        router = router_of(ffn)
        assert router.bias_E is None
        assert "bias_E" not in router.state_dict()


# --- expert dropout ---

BY_LOGITS = ["topk", "topk_unnormalised", "topk_softmax", "sigmoid", "sigmoid_top_1", "switch", "gshard"]


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_dropped_experts_are_not_offered_and_follow_by_index(name: str, rate: float) -> None:
    ffn = with_router(ROUTERS[name], expert_dropout=rate, jitter=0.0)
    z_TE, context = random(TOKENS, EXPERTS), context_of(4, 10, seed=2)
    draws_TE = context.uniform(Purpose.EXPERT_DROPOUT, EXPERTS)
    offered_TE = z_TE.masked_fill(draws_TE < rate, -math.inf)
    routing = at_logits(ffn, z_TE, context, training=True)
    assert routing.experts_TK.tolist() == best(offered_TE, ffn.top_k)
    undropped = at_logits(ffn, z_TE, context)
    assert torch.equal(routing.weights_TK, undropped.weigh(routing.experts_TK)), "weights are of the scores undropped"
    assert torch.equal(routing.probabilities_TE, undropped.probabilities_TE)
    assert undropped.experts_TK.tolist() == best(z_TE, ffn.top_k), "off in evaluation"


@pytest.mark.parametrize("name", [*BY_LOGITS, "gshard_sampled"])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_rate_of_dropout_within_three_sigma(name: str, rate: float) -> None:
    """Expert 2 is by far the best of every token: it is missing as often as it is dropped."""
    tokens = 10_000
    z_TE = torch.zeros(tokens, EXPERTS, dtype=torch.float64)
    z_TE[:, 2] = 50.0
    ffn = with_router(ROUTERS[name], expert_dropout=rate, jitter=0.0)
    experts_TK = at_logits(ffn, z_TE, context_of(100, tokens // 100), training=True).experts_TK
    missing = 1.0 - (experts_TK == 2).any(dim=1).double().mean().item()
    assert abs(missing - rate) < 3 * math.sqrt(rate * (1 - rate) / tokens)
