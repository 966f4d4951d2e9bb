"""What must hold of every router for every batch, and of balance for every load."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import DIM, OF_ALL_TOKENS, ROUTERS, at_logits, context_of, ffn_of, random, router_of, with_router
from torch import Tensor

from moe_train.moe.losses import ShareLoss, VariationLoss
from moe_train.moe.routing import Routing

QUICK = settings(max_examples=60, deadline=None)
NAMES = st.sampled_from(sorted(ROUTERS))
LEVELS = st.sampled_from([-1.0, 0.0, 0.0, 0.5, 1.0])
"""Few different scores, so that many are equal."""


def route(name: str, batch: int, length: int, lengths: list[int] | None, seed: int, training: bool) -> Routing:
    """One pass with everything drawn that can be; ``lengths`` are the valid tokens of each sequence."""
    ffn = ROUTERS[name] if name == "hash" else with_router(ROUTERS[name], jitter=0.2, expert_dropout=0.3)
    valid_BS = None if lengths is None else torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    context = context_of(batch, length, seed=seed, valid_BS=valid_BS)
    routing: Routing = router_of(ffn, training=training)(random(batch * length, DIM, seed=seed), context)
    return routing


@QUICK
@given(NAMES, st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6), st.booleans(), st.data())
def test_a_token_never_gets_an_expert_twice(
    name: str, batch: int, length: int, seed: int, training: bool, data: st.DataObject
) -> None:
    padded = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    routing = route(name, batch, length, data.draw(st.none() | padded), seed, training)
    experts = ROUTERS[name].num_experts
    assert all(len(set(row)) == len(row) for row in routing.experts_TK.tolist())
    assert ((routing.experts_TK >= 0) & (routing.experts_TK < experts)).all()
    assert routing.weights_TK.isfinite().all()
    assert (routing.weights_TK >= 0).all()
    assert not routing.ranking_TE.isnan().any()


@QUICK
@given(st.sampled_from(sorted(set(ROUTERS) - OF_ALL_TOKENS)), st.integers(1, 7), st.integers(0, 10**6), st.booleans())
def test_what_a_sequence_gets_does_not_depend_on_its_neighbours(
    name: str, length: int, seed: int, training: bool
) -> None:
    """The base of the layout contract: any split of the batch over ranks and micro-batches routes alike."""
    ffn = ROUTERS[name] if name == "hash" else with_router(ROUTERS[name], jitter=0.2, expert_dropout=0.3)
    router, x_TD = router_of(ffn, training=training), random(3 * length, DIM, seed=seed)
    whole = router(x_TD, context_of(3, length, seed=seed))
    for b in range(3):
        alone = router(x_TD[b * length : (b + 1) * length], context_of(1, length, seed=seed, first=b))
        rows = slice(b * length, (b + 1) * length)
        assert torch.equal(alone.experts_TK, whole.experts_TK[rows])
        assert torch.allclose(alone.weights_TK, whole.weights_TK[rows], rtol=0, atol=1e-12)


@QUICK
@given(st.sampled_from(["topk", "topk_softmax", "sigmoid", "gshard"]), st.data(), st.integers(1, 5))
def test_ties_go_to_the_lowest_experts(kind: str, data: st.DataObject, tokens: int) -> None:
    z_TE = torch.tensor(data.draw(st.lists(st.lists(LEVELS, min_size=6, max_size=6), min_size=tokens, max_size=tokens)))
    expected = [sorted(range(6), key=lambda e, row=row: (-row[e], e))[:2] for row in z_TE.tolist()]
    assert at_logits(ffn_of(kind, 6, 2), z_TE).experts_TK.tolist() == expected


@QUICK
@given(st.sampled_from(["max", "top2"]), st.sampled_from(["softmax", "sigmoid"]), st.data(), st.integers(1, 4))
def test_group_limited_is_its_slow_definition(rule: str, scores: str, data: st.DataObject, top_groups: int) -> None:
    groups, size = 4, 3
    row = data.draw(st.lists(LEVELS, min_size=12, max_size=12))
    top_k = data.draw(st.integers(1, top_groups * size))
    ffn = ffn_of(
        "group_limited",
        12,
        top_k,
        groups=groups,
        top_groups=top_groups,
        scores=scores,
        group_score=rule,
        normalize="none",
    )
    z_TE = torch.tensor([row], dtype=torch.float64)
    routing = at_logits(ffn, z_TE)
    s_E = (z_TE.sigmoid() if scores == "sigmoid" else z_TE.softmax(dim=1))[0].tolist()
    members = 1 if rule == "max" else 2
    group_scores = [sum(sorted(s_E[g * size : (g + 1) * size], reverse=True)[:members]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-group_scores[g], g))[:top_groups]
    allowed = [e for e in range(12) if e // size in best]
    assert routing.experts_TK[0].tolist() == sorted(allowed, key=lambda e: (-s_E[e], e))[:top_k]


@QUICK
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_expert_choice_is_exactly_balanced_for_every_length(batch: int, factor: int, seed: int) -> None:
    ffn, length = ffn_of("expert_choice", 6, 2, allow_future_leak=True), 3 * factor
    chosen_TK = at_logits(ffn, random(batch * length, 6, seed=seed), context_of(batch, length), training=True).chosen_TK
    assert (chosen_TK.view(batch, length, 6).sum(dim=1) == factor).all()


counts = st.lists(st.integers(0, 50), min_size=2, max_size=8)


@QUICK
@given(counts, st.integers(1, 50), st.integers(0, 10**6))
def test_trap_11_even_probabilities_cost_exactly_one_at_any_load(load: list[int], tokens: int, seed: int) -> None:
    """For experts and for the visits of devices whose sum is the most there can be."""
    load[0] += 1
    counts_E, even_E = torch.tensor(load).double(), torch.full((len(load),), tokens / len(load), dtype=torch.float64)
    totals = torch.cat([counts_E, even_E])
    assert math.isclose(share_loss(len(load)).value(totals).item(), tokens, rel_tol=1e-12)
    even_counts = torch.cat([torch.full_like(counts_E, 7.0), mass_of(len(load), tokens, seed)])
    assert math.isclose(share_loss(len(load)).value(even_counts).item(), tokens, rel_tol=1e-12)


@QUICK
@given(counts, st.integers(1, 7), st.integers(0, 10**6))
def test_the_loss_knows_shares_not_numbers(load: list[int], times: int, seed: int) -> None:
    load[0] += 1
    mass_E = mass_of(len(load), 5, seed)
    one, many = (torch.cat([factor * torch.tensor(load).double(), mass_E]) for factor in (1, times))
    found = [share_loss(len(load)).value(totals).item() for totals in (one, many)]
    assert math.isclose(*found, rel_tol=1e-12)
    assert 0.0 <= found[0] <= 5 * len(load) * (1 + 1e-12)


@QUICK
@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=8), st.floats(0.01, 100.0))
def test_variation_is_that_of_the_ratio_to_the_mean(sums: list[float], scale: float) -> None:
    loss = VariationLoss("importance_loss", 1.0, "importance")
    one, scaled = (
        loss.value(torch.tensor([1.0, *(factor * v for v in sums)], dtype=torch.float64)).item()
        for factor in (1.0, scale)
    )
    mean = sum(sums) / len(sums)
    expected = sum((v - mean) ** 2 for v in sums) / len(sums) / mean**2
    assert math.isclose(one, expected, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(one, scaled, rel_tol=1e-9, abs_tol=1e-12)
    assert -1e-12 <= one <= len(sums) - 1 + 1e-6


def share_loss(cells: int) -> ShareLoss:
    return ShareLoss("aux_loss", 1.0, "global", cells)


def mass_of(cells: int, tokens: int, seed: int) -> Tensor:
    mass_E = random(cells, seed=seed).exp()
    return mass_E * tokens / mass_E.sum()
