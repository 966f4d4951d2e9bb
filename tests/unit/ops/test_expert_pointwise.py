"""What stands between the products: gradients as autograd has them, compiled or not."""

import pytest
import torch
from ffn_samples import ACTIVATIONS, random

from moe_train.config.model import Activation
from moe_train.ops.activation import activate, inner_width
from moe_train.ops.expert_ffn.pointwise import hidden_gradients, weighted_hidden
from moe_train.ops.pointwise import fused

EACH_ACTIVATION = pytest.mark.parametrize("kind", ACTIVATIONS)


def compare(kind: Activation, dtype: torch.dtype, tolerance: float) -> None:
    # Wide enough to meet the clamps of the clamped SwiGLU.
    inner_NF = (8.0 * random(33, inner_width(kind, 20), seed=1)).requires_grad_()
    weights_N1, grad_NF = random(33, 1, seed=2).abs().requires_grad_(), random(33, 20, seed=3)
    expected_NF = activate(inner_NF, kind) * weights_N1
    expected = torch.autograd.grad(expected_NF, [inner_NF, weights_N1], grad_NF)
    operands = [t.detach().to(dtype) for t in (inner_NF, weights_N1, grad_NF)]
    before = [t.clone() for t in operands]
    found_NF = weighted_hidden(operands[0], operands[1], kind)
    h_NF, dinner_NF, dweights_N = hidden_gradients(*operands, kind)
    pairs = [(found_NF, expected_NF), (h_NF, expected_NF), (dinner_NF, expected[0]), (dweights_N, expected[1][:, 0])]
    for found, exact in pairs:
        assert found.shape == exact.shape
        assert ((found.double() - exact).norm() <= tolerance * exact.norm()).all()
    assert found_NF.dtype == dinner_NF.dtype == dtype
    assert dweights_N.dtype == torch.promote_types(dtype, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


@EACH_ACTIVATION
def test_equals_autograd(kind: Activation) -> None:
    compare(kind, torch.float64, 1e-14)


@EACH_ACTIVATION
def test_in_bf16(kind: Activation) -> None:
    compare(kind, torch.bfloat16, 2.0**-6)


@pytest.mark.slow
@EACH_ACTIVATION
def test_compiled(kind: Activation) -> None:
    """Nothing is rounded between the steps: closer than without, in bf16."""
    with fused("inductor"):
        compare(kind, torch.float64, 1e-13)
        compare(kind, torch.bfloat16, 2.0**-7)
