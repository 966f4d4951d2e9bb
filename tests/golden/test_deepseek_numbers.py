"""Group-limited routing at one vector of scores, on which the rules of DeepSeek-V3, of V2 and no limit all differ."""

import pytest
import torch
from routing_cases import V2, at_logits, ffn_of

LOGITS_TE = torch.tensor([[1, 0.9, -2, -2, 1.2, -3, -3, -3, 0.8, 0.7, -1, -1, 0, 0, 0, 0]], dtype=torch.float64)
GROUPS = {"groups": 4, "top_groups": 2}
V3_ROUTER = ffn_of("group_limited", 16, 4, {"loss_free": {}}, scale=2.5, **GROUPS)
V3_GROUP_SCORES = [1.4420, 0.8160, 1.3582, 1.0000]
V3_WEIGHTS = [0.652691168113603, 0.6347377281416853, 0.6160111695832786, 0.5965599341614329]
BIAS = 0.9
"""On expert 5, whose score is 0.047: it becomes the best by bias alone."""
WEIGHT_OF_5 = 0.0525


def test_deepseek_v3_sums_the_two_best_of_a_group() -> None:
    scores = LOGITS_TE.sigmoid().view(4, 4).topk(2, dim=1).values.sum(dim=1)
    assert scores.tolist() == pytest.approx(V3_GROUP_SCORES, abs=5e-5)
    routing = at_logits(V3_ROUTER, LOGITS_TE)
    assert routing.experts_TK.tolist() == [[0, 1, 8, 9]], "groups 0 and 2"
    assert routing.weights_TK[0].tolist() == pytest.approx(V3_WEIGHTS, abs=1e-15)
    assert routing.weights_TK.sum().item() == pytest.approx(2.5, abs=1e-15)


def test_deepseek_v2_takes_the_best_of_a_group() -> None:
    """Groups 0 and 1. The fourth choice is a tie of experts 2 and 3, which the source gives to 3, this project to 2."""
    assert LOGITS_TE[0, 2] == LOGITS_TE[0, 3]
    v2_router = ffn_of("group_limited", 16, 4, **V2, **GROUPS)
    assert at_logits(v2_router, LOGITS_TE).experts_TK.tolist() == [[4, 0, 1, 2]]
    untied_TE = LOGITS_TE.clone()
    untied_TE[0, 3] += 1e-9
    assert at_logits(v2_router, untied_TE).experts_TK.tolist() == [[4, 0, 1, 3]]


def test_without_groups() -> None:
    assert at_logits(ffn_of("topk", 16, 4), LOGITS_TE).experts_TK.tolist() == [[4, 0, 1, 8]]


def test_a_bias_brings_an_expert_in_but_weighs_by_its_score() -> None:
    bias_E = torch.zeros(16)
    bias_E[5] = BIAS
    routing = at_logits(V3_ROUTER, LOGITS_TE, bias_E=bias_E)
    assert routing.experts_TK.tolist() == [[5, 4, 0, 1]]
    assert routing.weights_TK[0, 0].item() == pytest.approx(WEIGHT_OF_5, abs=5e-5)
