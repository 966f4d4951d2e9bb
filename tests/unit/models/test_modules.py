"""Linear maps, norms and feed-forward networks: their formulas, and in which precision they compute."""

import pytest
import torch
from model_samples import filled, random

from moe_train.config.model import Activation
from moe_train.models.modules import FeedForward, SharedExperts
from moe_train.moe.modules import Linear, RMSNorm
from moe_train.ops.activation import GATED, activate

ACTIVATIONS: list[Activation] = ["swiglu", "geglu", "gelu", "relu", "swiglu_clamped"]
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)


def test_rms_norm() -> None:
    norm, x_BD = filled(RMSNorm(8, eps=1e-2)), random(5, 8)
    expected_BD = x_BD / (x_BD.square().mean(dim=1, keepdim=True) + 1e-2).sqrt() * norm.weight
    assert torch.allclose(norm(x_BD), expected_BD, rtol=0, atol=1e-14)


def test_rms_norm_of_bf16_is_that_of_fp32_rounded_once() -> None:
    norm, x_BD = filled(RMSNorm(64, eps=1e-5), torch.float32), random(50, 64).bfloat16()
    assert norm(x_BD).dtype == torch.bfloat16
    assert torch.equal(norm(x_BD), norm(x_BD.float()).bfloat16())


def test_rms_norm_ignores_the_scale_of_its_input() -> None:
    norm, x_BD = filled(RMSNorm(8, eps=1e-30)), random(5, 8)
    assert torch.allclose(norm(x_BD), norm(1000 * x_BD), rtol=0, atol=1e-12)


@EACH_ACTIVATION
def test_a_feed_forward_network(activation: Activation) -> None:
    """With a gate its rows come first, then those of up."""
    ffn, x_BD = filled(FeedForward(6, 4, activation, 1.0, 1.0)), random(5, 6)
    rows = [x_BD @ row_D for row_D in ffn.gate_up.weight]
    assert len(rows) == (8 if activation in GATED else 4)
    assert ffn.down.weight.shape == (6, 4)
    expected_BD = activate(torch.stack(rows, dim=1), activation) @ ffn.down.weight.t()
    assert torch.allclose(ffn(x_BD), expected_BD, rtol=0, atol=1e-12)


def test_swiglu() -> None:
    ffn, x_BD = filled(FeedForward(6, 4, "swiglu", 1.0, 1.0)), random(5, 6)
    gate_BF, up_BF = x_BD @ ffn.gate_up.weight[:4].t(), x_BD @ ffn.gate_up.weight[4:].t()
    expected_BD = (gate_BF * torch.sigmoid(gate_BF) * up_BF) @ ffn.down.weight.t()
    assert torch.allclose(ffn(x_BD), expected_BD, rtol=0, atol=1e-13)


@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_map_takes_the_dtype_of_its_input_and_keeps_its_master_weights(biased: bool) -> None:
    linear, x_BD = filled(Linear(6, 3, 1.0, biased), torch.float32), random(5, 6).bfloat16()
    y_BD = linear(x_BD)
    assert y_BD.dtype == torch.bfloat16
    y_BD.sum().backward()
    assert len(list(linear.parameters())) == 1 + biased
    for parameter in linear.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_a_bias_is_added() -> None:
    linear, x_BD = filled(Linear(6, 3, 1.0, biased=True)), random(5, 6)
    assert linear.bias is not None
    assert torch.allclose(linear(x_BD), x_BD @ linear.weight.t() + linear.bias, rtol=0, atol=1e-14)
    assert Linear(6, 3, 1.0).bias is None


@EACH_ACTIVATION
def test_shared_experts_are_their_separate_networks_added_up(activation: Activation) -> None:
    """Two of width 4 as one of width 8."""
    shared, x_BSD = filled(SharedExperts(6, 8, activation, 1.0, 1.0)), random(2, 5, 6)
    inner = shared.gate_up.weight.view(-1, 2, 4, 6)  # gate and up, experts
    expected_BSD = torch.zeros_like(x_BSD)
    for expert in range(2):
        h_BSF = x_BSD @ inner[:, expert].flatten(0, 1).t()
        down_DF = shared.down.weight[:, 4 * expert : 4 * expert + 4]
        expected_BSD = expected_BSD + activate(h_BSF, activation) @ down_DF.t()
    assert torch.allclose(shared(x_BSD), expected_BSD, rtol=0, atol=1e-11)


def test_the_gate_of_shared_experts_is_one_sigmoid_per_token() -> None:
    gated, x_BSD = filled(SharedExperts(6, 8, "swiglu", 1.0, 1.0, gated=True)), random(2, 5, 6)
    plain = SharedExperts(6, 8, "swiglu", 1.0, 1.0)
    assert plain.token_gate is None
    plain.gate_up, plain.down = gated.gate_up, gated.down
    assert gated.token_gate is not None
    w_D = gated.token_gate.weight[0]
    assert gated.token_gate.weight.shape == (1, 6)
    for b in range(2):
        for s in range(5):
            share = 1 / (1 + torch.exp(-(w_D @ x_BSD[b, s])))
            assert torch.allclose(gated(x_BSD)[b, s], share * plain(x_BSD)[b, s], rtol=0, atol=1e-12)
    gated.token_gate.weight.data.zero_()
    assert torch.allclose(gated(x_BSD), 0.5 * plain(x_BSD), rtol=0, atol=1e-12)
