"""Over how many ranks experts in attention divide, with or without others in the layer."""

import pytest

from moe_train.config.attention import SwitchHeadConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.rules import layout_problems


def problems(ep: int, heads: int, experts: int, in_layer: int) -> list[str]:
    """Rules broken by EP groups of all ranks."""
    attention = SwitchHeadConfig(experts=experts)
    model = ModelConfig(heads=heads, attention=attention, ffn=FFNConfig(num_experts=in_layer))
    found = list(layout_problems(ep, in_layer, ep, model))
    assert all((problem.key, problem.value) == ("parallel.ep", ep) for problem in found)
    return [problem.rule for problem in found]


def test_both_numbers_are_named() -> None:
    (rule,) = problems(4, 2, 3, 8)
    assert rule == "must divide model.heads x model.attention.experts = 2 x 3"


@pytest.mark.parametrize(("heads", "experts"), [(2, 2), (1, 4), (4, 3), (2, 6)])
def test_heads_and_experts_divide_together(heads: int, experts: int) -> None:
    assert problems(4, heads, experts, 8) == []


def test_every_number_that_does_not_divide_is_a_problem() -> None:
    assert len(problems(4, 1, 3, 6)) == 2


def test_a_dense_layer_is_no_problem_where_attention_has_experts() -> None:
    assert problems(2, 2, 4, 0) == []
    (problem,) = layout_problems(2, 0, 2, ModelConfig())
    assert "dense model" in problem.rule
