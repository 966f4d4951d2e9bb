"""Sums of messages between experts: three ways, one result; and what they are allowed to hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops.messages import sum_chosen_messages, sum_messages, sum_messages_one_by_one

QUICK = settings(max_examples=40, deadline=None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_gradients(m_TED: Tensor, *inputs: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(m_TED, inputs, random(*m_TED.shape, seed=7), allow_unused=True)
    return [m_TED, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_sums_by_hand() -> None:
    """Rows receive, columns send."""
    strength_TEE = torch.tensor([[[0.0, 2.0, 1.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    h_TED = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [10.0, 20.0]]])
    expected_TED = torch.tensor([[[10.0, 22.0], [0.5, 0.0], [0.0, 0.0]]])
    sources_EM = torch.tensor([[1, 2], [0, 2], [1, 0]])
    assert torch.equal(sum_messages_one_by_one(strength_TEE, h_TED), expected_TED)
    assert torch.equal(sum_messages(strength_TEE, h_TED), expected_TED)
    assert torch.equal(sum_chosen_messages(strength_TEE, h_TED, sources_EM), expected_TED)
    sources_EM = torch.tensor([[2], [2], [2]])
    assert torch.equal(sum_chosen_messages(strength_TEE, h_TED, sources_EM)[0, 0], h_TED[0, 2]), "1.0 of the last"


@QUICK
@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_all_messages(tokens: int, num_experts: int, dim: int, seed: int) -> None:
    strength_TEE = random(tokens, num_experts, num_experts, seed=seed).requires_grad_()
    h_TED = random(tokens, num_experts, dim, seed=seed + 1).requires_grad_()
    found, expected = (
        with_gradients(way(strength_TEE, h_TED), strength_TEE, h_TED) for way in (sum_messages, sum_messages_one_by_one)
    )
    assert_close(found, expected)


@QUICK
@given(st.data(), st.integers(0, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_chosen_messages_are_all_of_masked_strengths(
    data: st.DataObject, tokens: int, num_experts: int, seed: int
) -> None:
    """In any order of the sources, and with any number of them, none included; an edge left out gets no gradient."""
    num_sources = data.draw(st.integers(0, num_experts))
    sources_EM = random(num_experts, num_experts, seed=seed).argsort(dim=1)[:, :num_sources]
    mask_EE = torch.zeros(num_experts, num_experts, dtype=torch.bool).scatter_(1, sources_EM, True)
    strength_TEE = random(tokens, num_experts, num_experts, seed=seed + 1).requires_grad_()
    h_TED = random(tokens, num_experts, 3, seed=seed + 2).requires_grad_()
    expected, loop = (
        with_gradients(way(strength_TEE.masked_fill(~mask_EE, 0.0), h_TED), strength_TEE, h_TED)
        for way in (sum_messages, sum_messages_one_by_one)
    )
    chosen_TED = sum_chosen_messages(strength_TEE, h_TED, sources_EM)
    if num_sources == 0:
        assert torch.equal(chosen_TED, torch.zeros_like(h_TED))
        return
    found = with_gradients(chosen_TED, strength_TEE, h_TED)
    assert_close(found, expected)
    assert_close(found, loop)
    assert not found[1][:, ~mask_EE].any()


@pytest.mark.parametrize("way", ["one by one", "all", "chosen"])
def test_the_sum_has_the_dtype_of_what_is_sent(way: str) -> None:
    """Strengths are fp32 beside bf16 activations."""
    strength_TEE, h_TED = random(2, 3, 3).float(), random(2, 3, 4, seed=1).bfloat16()
    sums = {
        "one by one": lambda: sum_messages_one_by_one(strength_TEE, h_TED),
        "all": lambda: sum_messages(strength_TEE, h_TED),
        "chosen": lambda: sum_chosen_messages(strength_TEE, h_TED, torch.arange(3).expand(3, 3)),
    }
    m_TED = sums[way]()
    assert m_TED.dtype == torch.bfloat16
    exact_TED = sum_messages(strength_TEE.double(), h_TED.double())
    assert (m_TED.double() - exact_TED).abs().max() < 2.0**-6 * exact_TED.abs().max()


@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_the_work_of_few_sources_grows_with_them(num_sources: int) -> None:
    """Saved for the backward pass: one gathered copy of what is sent and one strength, for each source."""
    tokens, num_experts, dim = 6, 5, 4
    strength_TEE = random(tokens, num_experts, num_experts).requires_grad_()
    h_TED = random(tokens, num_experts, dim, seed=1).requires_grad_()
    sources_EM = random(num_experts, num_experts, seed=2).argsort(dim=1)[:, :num_sources]
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.data_ptr() not in (strength_TEE.data_ptr(), h_TED.data_ptr()):
            saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum_chosen_messages(strength_TEE, h_TED, sources_EM)
    assert sum(saved) == num_sources * tokens * num_experts * (dim + 1)
    assert math.prod(h_TED.shape) == tokens * num_experts * dim
