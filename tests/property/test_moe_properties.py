"""What must hold of capacity and balance for every routing."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.moe.balance import balance_sum
from moe_train.moe.capacity import queue_positions

QUICK = settings(max_examples=80, deadline=None)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """experts_TK, wanted_TK, the length of a sequence, and the number of experts."""
    batch, length, experts = (draw(st.integers(1, high)) for high in (3, 6, 5))
    top_k = draw(st.integers(1, experts))
    rows = batch * length
    experts_TK = [draw(st.permutations(range(experts)))[:top_k] for _ in range(rows)]
    wanted = draw(st.lists(st.booleans(), min_size=rows * top_k, max_size=rows * top_k))
    return torch.tensor(experts_TK), torch.tensor(wanted).view(rows, top_k), length, experts


@QUICK
@given(choices())
def test_queue_positions_equal_a_plain_loop(case: tuple[Tensor, Tensor, int, int]) -> None:
    experts_TK, wanted_TK, length, experts = case
    found_TK = queue_positions(experts_TK, wanted_TK, length, experts)
    waiting = [0] * experts
    for t, row in enumerate(experts_TK.tolist()):
        if t % length == 0:
            waiting = [0] * experts
        for k, expert in enumerate(row):
            if wanted_TK[t, k]:
                assert found_TK[t, k].item() == waiting[expert]
                waiting[expert] += 1


@QUICK
@given(choices(), st.integers(0, 17))
def test_queue_positions_do_not_see_the_future(case: tuple[Tensor, Tensor, int, int], cut: int) -> None:
    experts_TK, wanted_TK, length, experts = case
    end = cut % length + 1
    sequence = queue_positions(experts_TK[:length], wanted_TK[:length], length, experts)
    beginning = queue_positions(experts_TK[:end], wanted_TK[:end], end, experts)
    assert torch.equal(torch.where(wanted_TK[:end], sequence[:end], 0), torch.where(wanted_TK[:end], beginning, 0))


@QUICK
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30))
def test_even_load_or_even_probabilities_cost_one(experts: int, tokens: int, top_k: int) -> None:
    """E·Σ f·P is 1 as soon as one of the two is even, whatever the other is."""
    even_E, mass_E = torch.full((experts,), tokens * top_k), torch.rand(experts, dtype=torch.float64) + 0.1
    mass_E = mass_E * tokens / mass_E.sum()
    assert math.isclose(balance_sum(even_E, mass_E).item(), tokens, rel_tol=1e-12)
    counts_E = torch.randint(0, 9, (experts,)) + 1
    even_mass_E = torch.full((experts,), tokens / experts, dtype=torch.float64)
    assert math.isclose(balance_sum(counts_E, even_mass_E).item(), tokens, rel_tol=1e-12)
