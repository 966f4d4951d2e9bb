"""The parts of a block: their formulas, and in which precision they compute."""

import torch
from model_samples import config_of
from torch import Tensor, nn

from moe_train.models.blocks import Attention, Linear, RMSNorm, SwiGLU


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def test_rms_norm() -> None:
    norm, x_BD = filled(RMSNorm(8, eps=1e-2)).double(), random(5, 8)
    expected_BD = x_BD / (x_BD.square().mean(dim=1, keepdim=True) + 1e-2).sqrt() * norm.weight
    assert torch.allclose(norm(x_BD), expected_BD, rtol=0, atol=1e-14)


def test_rms_norm_of_bf16_is_that_of_fp32_rounded_once() -> None:
    norm, x_BD = filled(RMSNorm(64, eps=1e-5)), random(50, 64).bfloat16()
    assert norm(x_BD).dtype == torch.bfloat16
    assert torch.equal(norm(x_BD), norm(x_BD.float()).bfloat16())


def test_rms_norm_ignores_the_scale_of_its_input() -> None:
    norm, x_BD = filled(RMSNorm(8, eps=1e-30)).double(), random(5, 8)
    assert torch.allclose(norm(x_BD), norm(1000 * x_BD), rtol=0, atol=1e-12)


def test_swiglu() -> None:
    ffn, x_BD = filled(SwiGLU(6, 4, 1.0, 1.0)).double(), random(5, 6)
    gate_BF, up_BF = x_BD @ ffn.gate_up.weight[:4].t(), x_BD @ ffn.gate_up.weight[4:].t()
    expected_BD = (gate_BF * torch.sigmoid(gate_BF) * up_BF) @ ffn.down.weight.t()
    assert torch.allclose(ffn(x_BD), expected_BD, rtol=0, atol=1e-13)


def test_a_linear_map_takes_the_dtype_of_its_input_and_keeps_its_master_weights() -> None:
    linear, x_BD = filled(Linear(6, 3, 1.0)), random(5, 6).bfloat16()
    y_BD = linear(x_BD)
    assert y_BD.dtype == torch.bfloat16
    y_BD.sum().backward()
    assert linear.weight.dtype == torch.float32
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_attention_at_one_position_is_its_value_projected() -> None:
    config = config_of()
    attention, x_BSD = filled(Attention(config, 1.0)).double(), random(2, 1, config.dim)
    no_turn = torch.ones(1, attention.width // 2), torch.zeros(1, attention.width // 2)
    values = x_BSD @ attention.qkv.weight[-attention.kv_heads * attention.width :].t()
    per_head = values.view(2, 1, attention.kv_heads, attention.width)
    shared = per_head.repeat_interleave(attention.heads // attention.kv_heads, dim=2).flatten(2)
    expected_BSD = shared @ attention.out.weight.t()
    assert torch.allclose(attention(x_BSD, *no_turn), expected_BSD, rtol=0, atol=1e-12)
