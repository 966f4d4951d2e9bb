"""What expert choice may tell a token of the future: more than K·log2((1 - R) / R) bits, R = K / E."""

import pytest
from routing_cases import ffn_of

from moe_train.config.routing_rules import routing_problems


@pytest.mark.parametrize(("top_k", "experts", "bits"), [(2, 16, "5.61"), (6, 64, "19.64"), (8, 256, "39.63")])
def test_the_refusal_of_expert_choice_names_the_bound(top_k: int, experts: int, bits: str) -> None:
    (problem,) = routing_problems(ffn_of("expert_choice", experts, top_k))
    assert f"more than {bits} bits per token can leak" in problem.rule
    assert list(routing_problems(ffn_of("expert_choice", experts, top_k, allow_future_leak=True))) == []
