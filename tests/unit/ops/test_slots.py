"""Rows in buffers of fixed size, against plain loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops.slots import fill_slots, fill_slots_reference, map_slots, sum_slots, sum_slots_reference

QUICK = settings(max_examples=80, deadline=None)
WIDTH = 3


@st.composite
def places(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Places [T, K] in a buffer, none of them taken twice, some choices without one, and the size of the buffer."""
    tokens, choices, size = (draw(st.integers(1, high)) for high in (6, 4, 12))
    free = draw(st.permutations(range(size)))
    slots = [free.pop() if free and draw(st.booleans()) else size for _ in range(tokens * choices)]
    return torch.tensor(slots).view(tokens, choices), size


def random_rows(number: int, seed: int) -> Tensor:
    return torch.randn(number, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(places())
def test_filling_and_summing_equal_plain_loops(case: tuple[Tensor, int]) -> None:
    slots_TK, size = case
    slot_map = map_slots(slots_TK, size)
    x_TD, y_ND = random_rows(len(slots_TK), 0), random_rows(size, 1)
    assert torch.equal(fill_slots(x_TD, slot_map), fill_slots_reference(x_TD, slots_TK, size))
    assert torch.allclose(sum_slots(y_ND, slot_map), sum_slots_reference(y_ND, slots_TK), rtol=0, atol=1e-14)


@QUICK
@given(places())
def test_filling_and_summing_are_adjoint(case: tuple[Tensor, int]) -> None:
    """<fill(x), y> = <x, sum(y)>, by their values and by their gradients."""
    slots_TK, size = case
    slot_map = map_slots(slots_TK, size)
    x_TD, y_ND = random_rows(len(slots_TK), 0).requires_grad_(), random_rows(size, 1).requires_grad_()
    filled_ND, summed_TD = fill_slots(x_TD, slot_map), sum_slots(y_ND, slot_map)
    assert torch.allclose((filled_ND * y_ND).sum(), (x_TD * summed_TD).sum(), rtol=0, atol=1e-12)
    (back_TD,) = torch.autograd.grad(filled_ND, x_TD, y_ND.detach())
    (there_ND,) = torch.autograd.grad(summed_TD, y_ND, x_TD.detach())
    assert torch.equal(back_TD, summed_TD.detach())
    assert torch.equal(there_ND, filled_ND.detach())


def test_empty_places_are_zeros_even_where_memory_was_not() -> None:
    slot_map = map_slots(torch.tensor([[2, 5], [0, 5]]), 5)
    assert slot_map.tokens_N.tolist() == [1, 2, 0, 2, 2]
    filled_ND = fill_slots(torch.full((2, WIDTH), float("inf")), slot_map)
    assert torch.equal(filled_ND[[1, 3, 4]], torch.zeros(3, WIDTH))


def test_bf16_rows_keep_their_dtype() -> None:
    slot_map = map_slots(torch.tensor([[0, 1], [2, 4]]), 4)
    filled_ND = fill_slots(torch.ones(2, WIDTH, dtype=torch.bfloat16), slot_map)
    assert filled_ND.dtype == torch.bfloat16
    assert sum_slots(filled_ND, slot_map).tolist() == [[2.0] * WIDTH, [1.0] * WIDTH]
