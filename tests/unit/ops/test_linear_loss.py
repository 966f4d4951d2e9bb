"""Head and cross-entropy in chunks: the loss and gradients of the whole, and never all logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.ops import linear_loss
from moe_train.ops.linear_loss import linear_cross_entropy_sum
from moe_train.ops.loss import IGNORE, cross_entropy_sum, cross_entropy_sum_reference

QUICK = settings(max_examples=60, deadline=None)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@QUICK
@given(st.data())
def test_equals_the_reference_in_values_and_gradients(data: st.DataObject) -> None:
    tokens, width, vocabulary = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    labels_T = torch.tensor([data.draw(st.sampled_from([IGNORE, *range(vocabulary)])) for _ in range(tokens)])
    leaves = [random(tokens, width, seed=0), random(vocabulary, width, seed=1)]
    leaves += [random(vocabulary, seed=2)] if data.draw(st.booleans()) else []
    for leaf in leaves:
        leaf.requires_grad_()
    bias_V = leaves[2] if len(leaves) > 2 else None
    chunk = data.draw(st.one_of(st.none(), st.integers(1, tokens + 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "ROWS", data.draw(st.integers(1, tokens + 1)))
        found = linear_cross_entropy_sum(leaves[0], leaves[1], bias_V, labels_T, chunk)
    with torch.no_grad():
        alone = linear_cross_entropy_sum(leaves[0], leaves[1], bias_V, labels_T, chunk)
    logits_TV = F.linear(leaves[0], leaves[1], bias_V)
    expected = cross_entropy_sum_reference(logits_TV, labels_T) + 0.0 * logits_TV.sum()  # which hangs on all leaves
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.allclose(alone, expected, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(0.7 * loss, leaves) for loss in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("chunk", [None, 32])
def test_bf16_is_as_near_to_the_truth_as_the_whole_in_fp32_copies(chunk: int | None) -> None:
    """Masters are fp32, and so are their gradients and the loss."""
    x_TD, weight_VD = random(128, 32, seed=0, dtype=torch.bfloat16), random(500, 32, seed=1).float() / 4
    bias_V, labels_T = random(500, seed=2).float(), torch.arange(128)

    def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss / 128, leaves)]

    exact = [t.bfloat16().double().requires_grad_() for t in (x_TD, weight_VD, bias_V)]
    truth = gradients(cross_entropy_sum(F.linear(*exact), labels_T), exact)
    leaves = [t.clone().requires_grad_() for t in (x_TD, weight_VD, bias_V)]
    plain = gradients(cross_entropy_sum(F.linear(*(t.bfloat16() for t in leaves)), labels_T), leaves)
    found = gradients(linear_cross_entropy_sum(leaves[0], leaves[1], leaves[2], labels_T, chunk), leaves)
    for a, b, expected in zip(found, plain, truth, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - expected).norm() <= 1.3 * (b.double() - expected).norm() + 1e-6 * expected.norm()


class Largest(TorchDispatchMode):
    """Notes how many values the largest result of an operator has."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple) else (results,):
            self.values = max(self.values, result.numel() if isinstance(result, Tensor) else 0)
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_logits_than_a_chunk_are_made_or_kept(dtype: torch.dtype) -> None:
    tokens, width, vocabulary, chunk = 64, 4, 100, 8
    labels_T, kept = torch.arange(tokens), []

    def count(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    for chunk_tokens, largest in ((chunk, chunk * vocabulary), (None, tokens * vocabulary)):
        x_TD = random(tokens, width, seed=0, dtype=dtype).requires_grad_()
        weight_VD = random(vocabulary, width, seed=1).float().requires_grad_()
        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = linear_cross_entropy_sum(x_TD, weight_VD, None, labels_T, chunk_tokens)
            loss.backward()
        assert seen.values == largest
        with Largest() as seen, torch.no_grad():
            linear_cross_entropy_sum(x_TD, weight_VD, None, labels_T, chunk_tokens)
        assert seen.values == largest
    assert sum(kept) == 0


def test_a_second_backward_pass_is_refused() -> None:
    x_TD, weight_VD = random(3, 2, seed=0).requires_grad_(), random(5, 2, seed=1).requires_grad_()
    loss = linear_cross_entropy_sum(x_TD, weight_VD, None, torch.arange(3), None)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="handed out"):
        loss.backward()


def test_padding_alone_costs_nothing() -> None:
    leaves = [random(3, 2, seed=0).requires_grad_(), random(5, 2, seed=1).requires_grad_()]
    loss = linear_cross_entropy_sum(leaves[0], leaves[1], None, torch.full((3,), IGNORE), 2)
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))
