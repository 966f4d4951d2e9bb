"""Top-k: the order among equals is part of the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.topk import top_k, top_k_reference

SCORES = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_reference(k: int) -> None:
    scores_TE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(scores_TE, k), top_k_reference(scores_TE, k))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 6))
def test_equals_the_reference_among_ties_and_excluded_columns(data: st.DataObject, rows: int, columns: int) -> None:
    row = st.lists(SCORES, min_size=columns, max_size=columns)
    scores_TE = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    k = data.draw(st.integers(1, columns))
    assert torch.equal(top_k(scores_TE, k), top_k_reference(scores_TE, k))


def test_the_lowest_index_wins_among_equals() -> None:
    scores_TE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0], [-1.0, -2.0, -1.0, -2.0]])
    assert top_k(scores_TE, 3).tolist() == [[0, 1, 2], [1, 2, 0], [0, 2, 1]]


def test_no_index_repeats_when_too_few_scores_are_finite() -> None:
    """Of experts that are not offered, -inf, the lowest follow: a token never visits one expert twice."""
    scores_TE = torch.tensor([[-math.inf, 1.0, -math.inf, -math.inf], [-math.inf] * 4])
    assert top_k(scores_TE, 3).tolist() == [[1, 0, 2], [0, 1, 2]]


def test_all_of_them_is_a_permutation() -> None:
    scores_TE = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(top_k(scores_TE, 6).sort(dim=1).values, torch.arange(6).expand(7, 6))


def test_no_rows() -> None:
    assert top_k(torch.empty(0, 4), 2).shape == (0, 2)


def test_leaves_the_scores_alone_and_carries_no_gradient() -> None:
    scores_TE = torch.randn(3, 4, requires_grad=True)
    before_TE = scores_TE.detach().clone()
    assert not top_k(scores_TE, 2).requires_grad
    assert torch.equal(scores_TE, before_TE)
