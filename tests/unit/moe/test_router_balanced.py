"""Sinkhorn and BASE: balanced over all ranks' tokens in training, plain in evaluation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import DIM, EXPERTS, ROUTERS, at_logits, context_of, ffn_of, in_parts, random, router_of
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.dist.peers import Peers
from moe_train.moe.routers.base import balanced_assignment
from moe_train.moe.routing import Routing

BASE, SINKHORN, SINKHORN_1 = ROUTERS["base"], ROUTERS["sinkhorn"], ROUTERS["sinkhorn_top_1"]
BATCH, LENGTH = 4, 16
TOKENS = BATCH * LENGTH
VALID_BS = torch.arange(LENGTH) < torch.tensor([[16], [3], [0], [9]])
of_all_tokens = pytest.mark.parametrize("ffn", [BASE, SINKHORN, SINKHORN_1], ids=["base", "sinkhorn", "sinkhorn_top_1"])


def crowded(tokens: int, experts: int = EXPERTS) -> Tensor:
    """Scores by which a few experts would get most tokens."""
    return random(tokens, experts) + 1.5 * random(experts, seed=1)


def load(routing: Routing) -> Tensor:
    return torch.bincount(routing.experts_TK.flatten(), minlength=EXPERTS)


@of_all_tokens
@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
def test_ranks_that_hold_parts_of_the_batch_decide_as_one_would(
    ffn: FFNConfig, num_parts: int, is_padded: bool
) -> None:
    router, x_TD = router_of(ffn, training=True), random(TOKENS, DIM)
    valid_BS = VALID_BS if is_padded else None
    whole = router(x_TD, context_of(BATCH, LENGTH, valid_BS=valid_BS))
    size = BATCH // num_parts

    def part(index: int, peers: Peers) -> Routing:
        first = index * size
        valid = None if valid_BS is None else valid_BS[first : first + size]
        context = context_of(size, LENGTH, valid_BS=valid, peers=peers, first=first)
        routing: Routing = router(x_TD[first * LENGTH :][: size * LENGTH], context)
        return routing

    parts = in_parts(part, num_parts)
    assert torch.equal(torch.cat([routing.experts_TK for routing in parts]), whole.experts_TK)
    weights_TK = torch.cat([routing.weights_TK for routing in parts])
    assert torch.allclose(weights_TK, whole.weights_TK, rtol=0, atol=1e-13)
    alone = torch.cat([router(rows, context_of(size, LENGTH)).experts_TK for rows in x_TD.split(size * LENGTH)])
    assert not torch.equal(alone, whole.experts_TK), "over each rank's tokens alone it would be another choice"


@of_all_tokens
def test_evaluation_is_plain_top_k(ffn: FFNConfig) -> None:
    z_TE = crowded(TOKENS)
    routing = at_logits(ffn, z_TE)
    assert torch.equal(routing.experts_TK, z_TE.sort(dim=1, descending=True, stable=True).indices[:, : ffn.top_k])


@of_all_tokens
def test_weights_are_of_the_raw_scores(ffn: FFNConfig) -> None:
    z_TE = crowded(TOKENS)
    routing = at_logits(ffn, z_TE, training=True)
    chosen_TK = z_TE.gather(1, routing.experts_TK)
    expected_TK = chosen_TK.sigmoid() if ffn.top_k == 1 else chosen_TK.softmax(dim=1)
    assert torch.equal(routing.weights_TK, expected_TK)


# --- Sinkhorn ---


def sinkhorn_by_hand(z_TE: Tensor, tolerance: float = 1e-4, rounds: int = 100) -> Tensor:
    """Megatron's iteration on exp(z - max of the token)."""
    num, experts = z_TE.shape
    cost_TE = (z_TE - z_TE.max(dim=1, keepdim=True).values).exp()
    d1_E = torch.ones(experts, dtype=z_TE.dtype)
    for _ in range(rounds):
        d0_T = 1 / (num * ((d1_E * cost_TE).sum(dim=1) + 1e-8))
        old_E, d1_E = d1_E, 1 / (experts * ((d0_T.unsqueeze(1) * cost_TE).sum(dim=0) + 1e-8))
        if (d1_E - old_E).abs().mean() < tolerance:
            break
    return d1_E * cost_TE * d0_T.unsqueeze(1)


def test_sinkhorn_ranks_by_the_published_iteration() -> None:
    z_TE = crowded(TOKENS)
    found_TE, expected_TE = at_logits(SINKHORN, z_TE, training=True).ranking_TE, sinkhorn_by_hand(z_TE)
    assert torch.allclose(found_TE, expected_TE, rtol=1e-12, atol=0)
    assert torch.allclose(expected_TE.sum(dim=0), torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(expected_TE.sum(dim=1), torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64), atol=1e-3)


def test_sinkhorn_spreads_what_top_k_crowds() -> None:
    z_TE = crowded(2000)
    plain, even = load(at_logits(SINKHORN_1, z_TE)), load(at_logits(SINKHORN_1, z_TE, training=True))
    assert plain.max() > 2.2 * 2000 / EXPERTS
    assert even.max() < 1.5 * 2000 / EXPERTS


def test_sinkhorn_stops_at_its_tolerance_or_its_last_round() -> None:
    z_TE = crowded(TOKENS)
    one_round = at_logits(ffn_of("sinkhorn", EXPERTS, 2, max_iterations=1), z_TE, training=True).ranking_TE
    loose = at_logits(ffn_of("sinkhorn", EXPERTS, 2, tolerance=1e9), z_TE, training=True).ranking_TE
    assert torch.allclose(one_round, sinkhorn_by_hand(z_TE, rounds=1), rtol=1e-12, atol=0)
    assert torch.equal(loose, one_round)


def test_sinkhorn_does_not_overflow() -> None:
    routing = at_logits(SINKHORN, 1e4 * random(TOKENS, EXPERTS).float(), training=True)
    assert routing.ranking_TE.isfinite().all()


# --- BASE ---


def total(scores_NE: Tensor, experts_N: Tensor) -> float:
    return scores_NE.gather(1, experts_N.unsqueeze(1)).sum().item()


def optimum(scores_NE: Tensor) -> float:
    """The best total when each expert takes at most ceil(N / E) rows: a linear assignment to its equal copies."""
    room = math.ceil(scores_NE.shape[0] / scores_NE.shape[1])
    copies = scores_NE.repeat_interleave(room, dim=1).numpy()
    rows, columns = pytest.importorskip("scipy.optimize").linear_sum_assignment(copies, maximize=True)
    return float(copies[rows, columns].sum())


def assert_close_to_the_optimum(scores_NE: Tensor) -> None:
    num, experts = scores_NE.shape
    experts_N = balanced_assignment(scores_NE)
    counts_E = torch.bincount(experts_N, minlength=experts)
    assert counts_E.numel() == experts
    assert counts_E.max() <= math.ceil(num / experts)
    spread = max((scores_NE.max() - scores_NE.min()).item(), 1e-6)
    assert total(scores_NE, experts_N) >= optimum(scores_NE) - num / 256 * spread * (1 + 1e-9)


@pytest.mark.parametrize(("num", "experts"), [(64, 8), (120, 6), (61, 8), (5, 8), (8, 8), (7, 1), (300, 3)])
def test_base_comes_close_to_the_best_assignment(num: int, experts: int) -> None:
    assert_close_to_the_optimum(crowded(num, experts))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_base_comes_close_to_the_best_assignment_among_ties_too(
    num: int, experts: int, seed: int, coarse: bool
) -> None:
    scores_NE = random(num, experts, seed=seed)
    assert_close_to_the_optimum(scores_NE.round() if coarse else scores_NE)


def test_the_optimum_is_what_trying_everything_finds() -> None:
    """A check of the check."""
    scores_NE = crowded(6, 3)
    tried = {p for p in itertools.product(range(3), repeat=6) if all(p.count(e) == 2 for e in range(3))}
    assert optimum(scores_NE) == pytest.approx(max(total(scores_NE, torch.tensor(p)) for p in tried), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_gives_every_expert_equally_many_tokens(dtype: torch.dtype) -> None:
    z_TE = crowded(TOKENS).to(dtype)
    assert load(at_logits(BASE, z_TE)).max() > 2 * TOKENS / EXPERTS, "greedily it would be crowded"
    routing = at_logits(BASE, z_TE, training=True)
    assert load(routing).tolist() == [TOKENS // EXPERTS] * EXPERTS


def test_base_with_equal_scores_is_still_balanced() -> None:
    assert load(at_logits(BASE, torch.zeros(TOKENS, EXPERTS), training=True)).tolist() == [TOKENS // EXPERTS] * EXPERTS


def test_base_balances_valid_tokens_only() -> None:
    context = context_of(BATCH, LENGTH, valid_BS=VALID_BS)
    routing = at_logits(BASE, crowded(TOKENS), context, training=True)
    counts_E = torch.bincount(routing.experts_TK[VALID_BS.flatten(), 0], minlength=EXPERTS)
    assert counts_E.sum() == 28
    assert counts_E.max() <= math.ceil(28 / EXPERTS)


def test_base_avoids_experts_that_dropout_takes_while_others_have_room() -> None:
    scores_NE = random(16, 4)
    scores_NE[:4, 0] = -math.inf
    experts_N = balanced_assignment(scores_NE)
    assert torch.bincount(experts_N, minlength=4).tolist() == [4, 4, 4, 4]
    assert (experts_N[:4] != 0).all()
