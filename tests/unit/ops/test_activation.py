"""Activations of feed-forward networks: against their formulas, and gpt-oss's against transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moe_train.config.model import Activation
from moe_train.ops.activation import GATED, activate, inner_width

HIDDEN = 5


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    """x Φ(x), exactly (arXiv 1606.08415)."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def clamped(gate: float, up: float) -> float:
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return (up + 1) * gate * sigmoid(1.702 * gate)


FORMULAS = {
    "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "swiglu_clamped": clamped,
    "gelu": gelu,
    "relu": lambda x: max(x, 0.0),
}
EACH = pytest.mark.parametrize("kind", FORMULAS)


def random(*shape: int) -> Tensor:
    """Large enough that clamping matters."""
    return 6 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@EACH
def test_formula(kind: Activation) -> None:
    h = random(3, 4, inner_width(kind, HIDDEN))
    columns = [h[..., :HIDDEN], h[..., HIDDEN:]] if kind in GATED else [h]  # gate, then up
    expected = [FORMULAS[kind](*values) for values in zip(*(c.flatten().tolist() for c in columns), strict=True)]
    found = activate(h, kind)
    assert found.shape == (3, 4, HIDDEN)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_only_those_in_glu_have_a_gate() -> None:
    assert {kind for kind in FORMULAS if inner_width(kind, HIDDEN) == 2 * HIDDEN} == {
        "swiglu", "geglu", "swiglu_clamped"
    }  # fmt: skip
    assert inner_width("gelu", HIDDEN) == inner_width("relu", HIDDEN) == HIDDEN


@EACH
def test_gradients(kind: Activation) -> None:
    h = random(2, inner_width(kind, HIDDEN)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: activate(h, kind), [h])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(kind: Activation, dtype: torch.dtype) -> None:
    assert activate(random(2, inner_width(kind, HIDDEN)).to(dtype), kind).dtype == dtype


@EACH
def test_nothing_comes_of_no_rows(kind: Activation) -> None:
    assert activate(torch.zeros(0, inner_width(kind, HIDDEN)), kind).shape == (0, HIDDEN)


def test_clamped_swiglu_is_that_of_transformers() -> None:
    """There gate and up alternate: column 2i and column 2i + 1."""
    published = SimpleNamespace(limit=7.0, alpha=1.702)
    h = random(20, 2 * HIDDEN)
    split = torch.cat([h[:, ::2], h[:, 1::2]], dim=1)
    expected = GptOssExperts._apply_gate(published, h)
    assert torch.allclose(activate(split, "swiglu_clamped"), expected, rtol=0, atol=1e-12)
    assert (h[:, ::2] > 7).any(), "or the upper limit is not put to the test"
    assert (h[:, 1::2] < -7).any(), "nor the lower one"
