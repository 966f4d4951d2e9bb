"""Moving rows: gathering, summing, and that each is the other's gradient. Properties are in tests/property."""

import pytest
import torch
from torch.autograd import gradcheck

from moe_train.ops.permute import RowMap, gather_rows, map_rows, sum_rows, sum_rows_reference

NONE = 3
DESTINATIONS_TM = torch.tensor([[2, 0], [NONE, 1], [NONE, NONE], [0, 0]])
"""Four tokens with two choices each among three destinations; token 2 goes nowhere."""


@pytest.fixture
def row_map() -> RowMap:
    return map_rows(DESTINATIONS_TM, NONE, num_rows=5)


def test_rows_are_sorted_by_destination_then_token(row_map: RowMap) -> None:
    assert row_map.choices_N.tolist() == [1, 6, 7, 3, 0]
    assert row_map.tokens_N.tolist() == [0, 3, 3, 1, 0]
    assert row_map.num_tokens == 4


def test_gather_copies_each_token_to_its_rows(row_map: RowMap) -> None:
    x_TD = torch.arange(8.0).view(4, 2)
    assert torch.equal(gather_rows(x_TD, row_map), x_TD[[0, 3, 3, 1, 0]])


def test_sum_equals_the_reference(row_map: RowMap) -> None:
    y_ND = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(sum_rows(y_ND, row_map), sum_rows_reference(y_ND, row_map), rtol=0, atol=1e-15)


def test_a_token_without_rows_sums_to_zero(row_map: RowMap) -> None:
    assert torch.equal(sum_rows(torch.ones(5, 3), row_map)[2], torch.zeros(3))


def test_rows_of_a_token_are_added_in_order_of_its_choices() -> None:
    # In this order fp32 keeps the last 1; any other order loses it.
    destinations_TM = torch.tensor([[2, 0, 1]])
    row_map = map_rows(destinations_TM, 3, num_rows=3)
    by_choice = torch.tensor([[1e8], [-1e8], [1.0]])
    assert sum_rows(by_choice[row_map.choices_N], row_map).item() == 1.0


def test_nothing_to_move() -> None:
    nowhere = map_rows(torch.full((3, 2), NONE), NONE, num_rows=0)
    assert gather_rows(torch.ones(3, 4), nowhere).shape == (0, 4)
    assert torch.equal(sum_rows(torch.ones(0, 4), nowhere), torch.zeros(3, 4))
    empty = map_rows(torch.empty(0, 2, dtype=torch.int64), NONE, num_rows=0)
    assert sum_rows(gather_rows(torch.ones(0, 4), empty), empty).shape == (0, 4)


def test_gradients(row_map: RowMap) -> None:
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: gather_rows(x, row_map), x_TD)
    assert gradcheck(lambda y: sum_rows(y, row_map), y_ND)


def test_stride_zero_gradients(row_map: RowMap) -> None:
    """What ``y.sum().backward()`` hands down is one number seen through strides of zero."""
    x_TD = torch.randn(4, 3, requires_grad=True)
    gather_rows(x_TD, row_map).sum().backward()
    assert x_TD.grad is not None
    assert torch.equal(x_TD.grad[:, 0], torch.tensor([2.0, 1.0, 0.0, 2.0]))
