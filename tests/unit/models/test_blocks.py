"""The blocks: what is added to the residual stream, and what a module of multi-token prediction makes of two inputs."""

import pytest
import torch
from model_samples import FEATURES, VARIANTS, config_of, filled, random
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.models.attention import GroupedQueryAttention, LatentAttention, rotary_width
from moe_train.models.blocks import MTPModule
from moe_train.models.build import build_block, shared_width
from moe_train.models.modules import FeedForward, SharedExperts
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.layer import MoELayer
from moe_train.ops.rotary import Rotary, rotary_table

LENGTH = 5
CONTEXT = RoutingContext.of(torch.arange(2 * LENGTH).view(2, LENGTH))


def rotary_of(config: ModelConfig) -> Rotary:
    return rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))


def rms(x_BSD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    return x_BSD / (x_BSD.square().mean(dim=-1, keepdim=True) + eps).sqrt() * gain_D


@pytest.mark.parametrize("variant", [*VARIANTS, *FEATURES])
def test_a_block_adds_attention_then_feed_forward(variant: str) -> None:
    config = config_of(*(VARIANTS | FEATURES)[variant])
    block = filled(build_block(config, 1, LocalExchange(config.ffn.num_experts)).double())
    x_BSD, rotary = random(2, LENGTH, config.dim), rotary_of(config)
    output = block(x_BSD, rotary, CONTEXT)
    middle_BSD = x_BSD + block.attention(rms(x_BSD, block.attention_norm.weight, config.norm_eps), rotary)
    normed_BSD = rms(middle_BSD, block.ffn_norm.weight, config.norm_eps)
    if isinstance(block.ffn, MoELayer):
        expected = block.ffn(normed_BSD, CONTEXT)
        (record,) = output.records
        assert torch.equal(record.counts_E, expected.record.counts_E)
        assert torch.allclose(output.x_BSD, middle_BSD + expected.y_BSD, rtol=1e-11, atol=1e-11)
    else:
        assert output.records == ()
        assert torch.allclose(output.x_BSD, middle_BSD + block.ffn(normed_BSD), rtol=1e-11, atol=1e-11)


def test_a_block_is_built_as_configured() -> None:
    gated, mixed, latent = (
        build_block(config_of(*FEATURES[name]), 1, LocalExchange(4))
        for name in ("norms of heads, shared gate", "norms over all heads, no gate", "latent attention")
    )
    assert isinstance(gated.ffn, MoELayer)
    assert isinstance(gated.ffn.shared, SharedExperts)
    assert gated.ffn.shared.down.weight.shape == (16, 7)
    assert gated.ffn.shared.token_gate is not None
    assert isinstance(mixed.ffn, MoELayer)
    assert mixed.ffn.experts.activation == "relu"
    assert mixed.ffn.experts.gate_up_LDF2.shape == (4, 16, 6)
    dense = build_block(config_of(*FEATURES["norms over all heads, no gate"]), 0, LocalExchange(4)).ffn
    assert isinstance(dense, FeedForward)
    assert dense.activation == "gelu"
    assert isinstance(gated.attention, GroupedQueryAttention)
    assert isinstance(latent.attention, LatentAttention)


@pytest.mark.parametrize(("number", "own", "expected"), [(0, None, 0), (1, None, 6), (3, None, 18), (2, 7, 14)])
def test_the_joint_width_of_shared_experts(number: int, own: int | None, expected: int) -> None:
    shared = [] if own is None else [f"model.ffn.shared_dim={own}"]
    assert shared_width(config_of(f"model.ffn.num_shared_experts={number}", *shared).ffn) == expected


def test_a_module_of_multi_token_prediction_joins_both_inputs_each_normed() -> None:
    """RMSNorm(embedding) first, then RMSNorm(hidden), projected; then a block (DeepSeek-V3, eq. 21 and 22); a norm."""
    config = config_of("model.norm_eps=1e-3")
    module = filled(MTPModule(config, build_block(config, 2, LocalExchange(4))).double())
    hidden_BSD, embedded_BSD, rotary = random(2, LENGTH, 16, seed=30), random(2, LENGTH, 16, seed=31), rotary_of(config)
    left = rms(embedded_BSD, module.embedding_norm.weight, 1e-3) @ module.project.weight[:, :16].t()
    right = rms(hidden_BSD, module.hidden_norm.weight, 1e-3) @ module.project.weight[:, 16:].t()
    expected = module.block(left + right, rotary, CONTEXT)
    found = module(hidden_BSD, embedded_BSD, rotary, CONTEXT)
    expected_BSD = rms(expected.x_BSD, module.norm.weight, 1e-3)
    assert torch.allclose(found.x_BSD, expected_BSD, rtol=0, atol=1e-11)
    assert torch.equal(found.records[0].counts_E, expected.records[0].counts_E)
