"""Top-k: the order among equals is part of the contract."""

import pytest
import torch

from moe_train.ops.topk import top_k, top_k_reference


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_reference(k: int) -> None:
    scores_TE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(scores_TE, k), top_k_reference(scores_TE, k))


def test_the_lowest_index_wins_among_equals() -> None:
    scores_TE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0], [-1.0, -2.0, -1.0, -2.0]])
    assert top_k(scores_TE, 3).tolist() == [[0, 1, 2], [1, 2, 0], [0, 2, 1]]


def test_all_of_them_is_a_permutation() -> None:
    scores_TE = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(top_k(scores_TE, 6).sort(dim=1).values, torch.arange(6).expand(7, 6))


def test_leaves_the_scores_alone_and_carries_no_gradient() -> None:
    scores_TE = torch.randn(3, 4, requires_grad=True)
    before_TE = scores_TE.detach().clone()
    assert not top_k(scores_TE, 2).requires_grad
    assert torch.equal(scores_TE, before_TE)
