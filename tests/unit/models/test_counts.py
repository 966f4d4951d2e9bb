"""Sizes in closed form against the built module and against what torch counts while it runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import VARIANTS, VOCAB, build, config_of, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config.compose import compose_config
from moe_train.config.groups import config_dir
from moe_train.config.schema import ModelConfig, TrainConfig
from moe_train.models import blocks
from moe_train.models.counts import count
from moe_train.models.transformer import Transformer
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, roles_of
from moe_train.ops.attention import causal_attention_reference

PRESETS = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def counted(config: ModelConfig) -> tuple[int, int]:
    """Total and active parameters of the built module: an expert that a token does not visit is left out."""
    with torch.device("meta"):
        model = Transformer(config, VOCAB, LocalExchange(config.ffn.num_experts), torch.float32)
    roles = roles_of(model)
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        visited = parameter[: config.ffn.top_k] if roles[name].kind is Kind.EXPERT else parameter
        active += visited.numel()
    return total, active


def assert_counted(config: ModelConfig) -> None:
    size = count(config, VOCAB, seq_len=8)
    assert (size.total, size.active) == counted(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset: str) -> None:
    assert_counted(compose_config("train", TrainConfig, lambda config: [], [f"model={preset}"]).model)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_model(data: st.DataObject) -> None:
    groups, shared = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    experts = data.draw(st.integers(0, 6))
    config = {
        "dim": 4 * groups * data.draw(st.integers(1, 3)),
        "layers": data.draw(st.integers(1, 5)),
        "heads": 2 * groups,
        "tie_embeddings": data.draw(st.booleans()),
        "attention": {"kv_heads": data.draw(st.sampled_from([None, groups, 1]))},
        "ffn": {
            "hidden_dim": data.draw(st.integers(1, 9)),
            "num_experts": experts,
            "top_k": data.draw(st.integers(1, max(1, experts))),
            "expert_dim": data.draw(st.integers(1, 9)),
            "num_shared_experts": shared,
            "every": data.draw(st.integers(1, 3)),
        },
    }
    assert_counted(ModelConfig.model_validate(config))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "capacity"])
def test_flops_of_the_forward_pass(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the plain attention in full, the closed form its causal half: the only difference.

    Under a capacity limit the closed form is an upper bound; what is dropped is not known from the configuration.
    """
    config = config_of(*VARIANTS[variant])
    model, tokens_BS = build(config), random_tokens()
    monkeypatch.setattr(blocks, "causal_attention", causal_attention_reference)  # the fused one is not counted on CPU
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    causal_half = 2 * config.dim * tokens_BS.shape[1] * config.layers
    per_token = count(config, VOCAB, tokens_BS.shape[1]).forward_flops_per_token
    assert counter.get_total_flops() == (per_token + causal_half) * tokens_BS.numel()


def test_backward_costs_twice_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    model, tokens_BS = build(config), random_tokens()
    monkeypatch.setattr(blocks, "causal_attention", causal_attention_reference)
    with FlopCounterMode(display=False) as forward:
        logits_BSV = model(tokens_BS).logits_BSV
    with FlopCounterMode(display=False) as backward:
        logits_BSV.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    size = count(config, VOCAB, seq_len=8)
    assert size.training_flops_per_token == 3 * size.forward_flops_per_token
