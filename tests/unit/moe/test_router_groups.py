"""Routers with groups of experts: group-limited (DeepSeek-V2 and V3) and hierarchical (two levels)."""

import pytest
import torch
from routing_cases import DIM, V2, at_logits, at_two_levels, context_of, ffn_of, random, router_of
from torch import Tensor

TOKENS, EXPERTS, GROUPS, SIZE = 50, 16, 4, 4
LIMIT = {"groups": GROUPS, "top_groups": 2}
V3_ROUTER = ffn_of("group_limited", EXPERTS, 4, {"loss_free": {}}, scale=2.5, **LIMIT)
V2_ROUTER = ffn_of("group_limited", EXPERTS, 4, **V2, **LIMIT)
TWO_LEVELS = ffn_of("hierarchical", EXPERTS, 4, **LIMIT)


def groups_of(experts_TK: Tensor) -> list[set[int]]:
    return [{expert // SIZE for expert in row} for row in experts_TK.tolist()]


def chosen_by_hand(choice_E: list[float], members: int) -> list[int]:
    """Score of a group: its best, or the sum of its two best; then the best experts of the two best groups."""
    scores = [sum(sorted(choice_E[g * SIZE : (g + 1) * SIZE], reverse=True)[:members]) for g in range(GROUPS)]
    groups = sorted(range(GROUPS), key=lambda g: (-scores[g], g))[:2]
    allowed = [e for e in range(EXPERTS) if e // SIZE in groups]
    return sorted(allowed, key=lambda e: (-choice_E[e], e))[:4]


def test_v3_takes_the_groups_with_the_largest_sums_of_two() -> None:
    z_TE, bias_E = random(TOKENS, EXPERTS), 0.3 * random(EXPERTS, seed=1)
    routing = at_logits(V3_ROUTER, z_TE, bias_E=bias_E)
    choice_TE = z_TE.sigmoid() + bias_E
    assert routing.experts_TK.tolist() == [chosen_by_hand(row, 2) for row in choice_TE.tolist()]


def test_v2_takes_the_groups_with_the_best_experts() -> None:
    z_TE = random(TOKENS, EXPERTS)
    routing = at_logits(V2_ROUTER, z_TE)
    assert routing.experts_TK.tolist() == [chosen_by_hand(row, 1) for row in z_TE.softmax(dim=1).tolist()]
    assert torch.equal(routing.weights_TK, z_TE.softmax(dim=1).gather(1, routing.experts_TK)), "not normalised"


@pytest.mark.parametrize("ffn", [V3_ROUTER, V2_ROUTER], ids=["V3", "V2"])
def test_a_token_visits_at_most_its_groups(ffn: object) -> None:
    experts_TK = at_logits(ffn, random(500, EXPERTS)).experts_TK
    assert max(len(groups) for groups in groups_of(experts_TK)) <= 2


def test_v3_weights_sum_to_their_scale_and_know_no_bias() -> None:
    z_TE, bias_E = random(TOKENS, EXPERTS), 0.3 * random(EXPERTS, seed=1)
    routing = at_logits(V3_ROUTER, z_TE, bias_E=bias_E)
    assert torch.allclose(routing.weights_TK.sum(dim=1), torch.full((TOKENS,), 2.5, dtype=torch.float64), atol=1e-14)
    without = at_logits(V3_ROUTER, z_TE)
    assert not torch.equal(without.experts_TK, routing.experts_TK)
    assert torch.equal(routing.weights_TK, without.weigh(routing.experts_TK)), "given the experts, b does not matter"


@pytest.mark.parametrize("ffn", [V3_ROUTER, V2_ROUTER], ids=["V3", "V2"])
def test_other_groups_stay_out_even_where_scores_are_negative(ffn: object) -> None:
    """With 0 instead of -inf as filler, experts of refused groups would win against negative biased scores."""
    z_TE = random(TOKENS, EXPERTS)
    biases = {"bias_E": torch.full((EXPERTS,), -3.0)} if ffn is V3_ROUTER else {}
    routing = at_logits(ffn, z_TE, **biases)
    assert max(len(groups) for groups in groups_of(routing.experts_TK)) <= 2
    assert torch.equal(routing.experts_TK, at_logits(ffn, z_TE).experts_TK)


def test_experts_of_refused_groups_are_never_to_be_chosen_later() -> None:
    """Rerouting reads the ranking: a dropped assignment must not leave its token's groups either."""
    routing = at_logits(V3_ROUTER, random(TOKENS, EXPERTS))
    finite_TE = routing.ranking_TE.isfinite()
    assert (finite_TE.sum(dim=1) == 2 * SIZE).all()
    assert finite_TE.gather(1, routing.experts_TK).all()


def test_as_many_choices_as_the_groups_hold_take_all_of_them() -> None:
    ffn = ffn_of("group_limited", EXPERTS, 2 * SIZE, **LIMIT)
    routing = at_logits(ffn, random(TOKENS, EXPERTS))
    assert all(len(set(row)) == 2 * SIZE for row in routing.experts_TK.tolist())
    assert all(len(groups) == 2 for groups in groups_of(routing.experts_TK))


# --- two levels ---


def test_weights_are_products_of_both_levels_and_sum_to_one() -> None:
    zg_TG, z_TE = random(TOKENS, GROUPS, seed=1), random(TOKENS, EXPERTS, seed=2)
    routing = at_two_levels(TWO_LEVELS, zg_TG, z_TE)
    assert routing.experts_TK.shape == (TOKENS, 2 * 2)
    assert torch.allclose(routing.weights_TK.sum(dim=1), torch.ones(TOKENS, dtype=torch.float64), rtol=0, atol=1e-14)
    for t in range(TOKENS):
        groups = zg_TG[t].topk(2)
        column = 0
        for group, group_weight in zip(groups.indices.tolist(), groups.values.softmax(0).tolist(), strict=True):
            inside = z_TE[t, group * SIZE : (group + 1) * SIZE].topk(2)
            for member, weight in zip(inside.indices.tolist(), inside.values.softmax(0).tolist(), strict=True):
                assert routing.experts_TK[t, column].item() == group * SIZE + member
                assert routing.weights_TK[t, column].item() == pytest.approx(group_weight * weight, abs=1e-14)
                column += 1


def test_the_probability_of_an_expert_is_its_groups_times_its_own_inside() -> None:
    zg_TG, z_TE = random(TOKENS, GROUPS, seed=1), random(TOKENS, EXPERTS, seed=2)
    routing = at_two_levels(TWO_LEVELS, zg_TG, z_TE)
    expected_TE = torch.cat(
        [zg_TG.softmax(1)[:, [g]] * z_TE[:, g * SIZE : (g + 1) * SIZE].softmax(1) for g in range(GROUPS)], dim=1
    )
    assert torch.allclose(routing.probabilities_TE, expected_TE, rtol=0, atol=1e-15)
    assert torch.equal(routing.logits_TE, z_TE)


def test_a_tie_of_groups_goes_to_the_lowest_and_a_good_expert_elsewhere_does_not_matter() -> None:
    zg_TG, z_TE = torch.zeros(1, GROUPS, dtype=torch.float64), torch.zeros(1, EXPERTS, dtype=torch.float64)
    z_TE[0, 15], z_TE[0, 3] = 9.0, 1.0
    assert at_two_levels(TWO_LEVELS, zg_TG, z_TE).experts_TK.tolist() == [[3, 0, 4, 5]]


def test_both_levels_learn_from_the_weights() -> None:
    router = router_of(TWO_LEVELS, training=True)
    weights_TK = router(random(TOKENS, DIM), context_of(5, 10)).weights_TK
    (weights_TK * random(TOKENS, 4, seed=4)).sum().backward()
    assert router.weight.grad.abs().max() > 1e-3
    assert router.group_weight.grad.abs().max() > 1e-3


def test_dropout_takes_experts_not_groups() -> None:
    ffn = ffn_of("hierarchical", EXPERTS, 4, expert_dropout=0.4, **LIMIT)
    dropping, plain = router_of(ffn, training=True), router_of(ffn)
    x_TD, context = random(TOKENS, DIM), context_of(5, 10)
    one, two = dropping(x_TD, context), plain(x_TD, context)
    assert groups_of(one.experts_TK) == groups_of(two.experts_TK)
    assert not torch.equal(one.experts_TK, two.experts_TK)
