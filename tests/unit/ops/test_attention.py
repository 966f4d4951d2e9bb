"""Causal attention and rotary positions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_train.ops.attention import causal_attention, causal_attention_reference, rotary_angles, rotate

WIDTH, LENGTH = 4, 7


def heads(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
def test_equals_the_reference(query_heads: int, kv_heads: int) -> None:
    q, k, v = heads(query_heads, 0), heads(kv_heads, 1), heads(kv_heads, 2)
    found, expected = causal_attention(q, k, v), causal_attention_reference(q, k, v)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, [q, k, v], upstream) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [causal_attention, causal_attention_reference])
def test_no_position_sees_a_later_one(attend: Callable[..., Tensor]) -> None:
    q, k, v = heads(2, 0), heads(2, 1), heads(2, 2)
    seen = torch.autograd.grad(attend(q, k, v)[:, :, 3].sum(), [k, v])
    for gradient in seen:
        assert torch.equal(gradient[:, :, 4:], torch.zeros_like(gradient[:, :, 4:]))
        assert gradient[:, :, :4].abs().max() > 0


def test_the_first_position_returns_its_own_value() -> None:
    q, k, v = heads(2, 0), heads(2, 1), heads(2, 2)
    assert torch.allclose(causal_attention(q, k, v)[:, :, 0], v[:, :, 0], rtol=0, atol=1e-14)


def turned(x_BHSW: Tensor, theta: float = 100.0) -> Tensor:
    angles_SW = rotary_angles(x_BHSW.shape[2], WIDTH, theta, x_BHSW.device)
    return rotate(x_BHSW, angles_SW.cos(), angles_SW.sin())


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    x = heads(3, 0)
    angles_SW = rotary_angles(LENGTH, WIDTH, 100.0, x.device)
    assert torch.allclose(angles_SW[3], torch.tensor([3.0, 0.3], dtype=torch.float64), rtol=0, atol=1e-14)
    pairs = torch.complex(x[..., : WIDTH // 2], x[..., WIDTH // 2 :])
    expected = pairs * torch.polar(torch.ones_like(angles_SW), angles_SW)
    assert torch.allclose(turned(x), torch.cat([expected.real, expected.imag], dim=-1), rtol=0, atol=1e-14)


def test_scores_depend_on_the_distance_only() -> None:
    """The property that rotary positions exist for (RoFormer, section 3.3)."""
    q, k = (turned(heads(1, seed)[:, :, :1].expand(-1, -1, LENGTH, -1)) for seed in (0, 1))
    scores_BHSS = q @ k.transpose(2, 3)
    for distance in range(-LENGTH + 1, LENGTH):
        along = scores_BHSS.diagonal(distance, dim1=2, dim2=3)
        assert torch.allclose(along, along[..., :1].expand_as(along), rtol=0, atol=1e-12)


def test_bf16_is_rotated_in_the_precision_of_the_tables() -> None:
    x = heads(1, 0).detach()
    angles_SW = rotary_angles(LENGTH, WIDTH, 100.0, x.device).float()
    found = rotate(x.bfloat16(), angles_SW.cos(), angles_SW.sin())
    expected = rotate(x.bfloat16().float(), angles_SW.cos(), angles_SW.sin()).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
