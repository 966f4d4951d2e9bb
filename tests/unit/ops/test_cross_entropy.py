"""Cross-entropy as a sum: exact over any split of the tokens, and blind to padding."""

import math

import pytest
import torch

from moe_train.ops.loss import IGNORE, cross_entropy_sum, cross_entropy_sum_reference

LABELS_T = torch.tensor([3, IGNORE, 0, 10, IGNORE, 7])


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_equals_the_reference() -> None:
    logits_TV = logits().requires_grad_()
    sums = [loss(logits_TV, LABELS_T) for loss in (cross_entropy_sum, cross_entropy_sum_reference)]
    assert torch.allclose(*sums, rtol=0, atol=1e-12)
    (found,), (expected,) = (torch.autograd.grad(total, logits_TV) for total in sums)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    assert torch.equal(found[LABELS_T == IGNORE], torch.zeros(2, 11, dtype=torch.float64))


def test_even_scores_cost_the_logarithm_of_the_vocabulary() -> None:
    assert cross_entropy_sum(torch.zeros(6, 11), LABELS_T).item() == pytest.approx(4 * math.log(11), rel=1e-6)


def test_parts_add_up() -> None:
    logits_TV = logits()
    parts = [cross_entropy_sum(logits_TV[rows], LABELS_T[rows]) for rows in (slice(1), slice(1, 2), slice(2, 6))]
    assert torch.allclose(torch.stack(parts).sum(), cross_entropy_sum(logits_TV, LABELS_T), rtol=0, atol=1e-13)


def test_padding_alone_costs_nothing() -> None:
    logits_TV = logits().requires_grad_()
    loss = cross_entropy_sum(logits_TV, torch.full((6,), IGNORE))
    assert loss.item() == 0.0
    (gradient_TV,) = torch.autograd.grad(loss, logits_TV)
    assert torch.equal(gradient_TV, torch.zeros_like(gradient_TV))


def test_bf16_logits_are_summed_in_fp32() -> None:
    loss = cross_entropy_sum(logits(torch.bfloat16), LABELS_T)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, cross_entropy_sum(logits(torch.bfloat16).float(), LABELS_T))
