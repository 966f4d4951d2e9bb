"""Parameters and FLOPs of blocks that only some tokens pass: published fractions, and what the built model has."""

from __future__ import annotations

import pytest
from model_samples import VOCAB, build, config_of, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config.compose import compose_config
from moe_train.config.depth import FullDepthConfig, MixtureOfDepthsConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.models import attention
from moe_train.models.counts import count
from moe_train.models.sizes import block_products, score_flops, tokens_taken
from moe_train.ops.attention import causal_attention_reference


def deep(config: ModelConfig, **keys: object) -> ModelConfig:
    return config.model_copy(update={"depth": MixtureOfDepthsConfig(**keys)})  # type: ignore[arg-type]


def published(dim: int) -> ModelConfig:
    """A GPT with 4·D hidden units."""
    return ModelConfig(dim=dim, layers=2, heads=dim // 64, ffn=FFNConfig(hidden_dim=4 * dim, activation="gelu"))


def whole_square(config: ModelConfig, layer: int, length: int) -> float:
    """FLOPs of a block per sequence as the published fractions count them: each token meets all, not half of them."""
    taken = tokens_taken(config, layer, length)
    return 2 * length * block_products(config, layer, length) + score_flops(config, layer, taken) * 2 * taken / (
        taken + 1
    )


@pytest.mark.parametrize(("dim", "of_block", "of_model"), [(768, 0.091, 0.546), (1024, 0.098, 0.549)])
def test_the_published_fractions(dim: int, of_block: float, of_model: float) -> None:
    """Every other block with a capacity of 0.125, 2,048 tokens."""
    full, length = published(dim), 2048
    some = deep(full, causal="classifier")
    flops = {
        name: [whole_square(one, layer, length) for layer in (0, 1)] for name, one in (("full", full), ("some", some))
    }
    assert flops["some"][0] == flops["full"][0]
    assert flops["some"][1] / flops["full"][1] == pytest.approx(of_block, abs=5e-4)
    assert sum(flops["some"]) / sum(flops["full"]) == pytest.approx(of_model, abs=5e-4)


@pytest.mark.parametrize("causal", ["classifier", "predictor"])
@pytest.mark.parametrize("capacity", [0.125, 0.3, 1.0])
@pytest.mark.parametrize("experts", [0, 4])
def test_counts_are_those_of_the_model_and_what_torch_counts(
    causal: str, capacity: float, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain attention multiplies only what a token sees, so that torch counts what the closed form does."""
    preset = () if experts else ("model=dense_tiny",)
    full, length = config_of(*preset, f"model.ffn.num_experts={experts}"), 24
    config = deep(full, capacity=capacity, causal=causal, predictor_dim=7)
    model, tokens_BS = build(config), random_tokens(3, length)
    monkeypatch.setattr(attention, "causal_attention", causal_attention_reference)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    size, whole = (count(one, VOCAB, length) for one in (config, full))
    scores = 2 * config.dim  # of each token by the router: a product with a vector, which torch does not count
    assert counter.get_total_flops() == pytest.approx(
        (size.forward_flops_per_token - scores) * tokens_BS.numel(), rel=1e-12
    )
    assert (size.forward_flops_per_token < whole.forward_flops_per_token) == (capacity < 1.0)
    assert size.total == sum(p.numel() for p in model.parameters())
    chosen_by = config.dim + (0 if causal == "classifier" else 7 * config.dim + 7 + 7 + 1)
    assert size.total - whole.total == chosen_by == size.active - whole.active


def test_the_small_preset_costs_what_its_header_says() -> None:
    composed = {
        name: compose_config("train", TrainConfig, train_problems, [f"model={name}"]).model
        for name in ("mod_tiny", "dense_tiny")
    }
    some, dense = composed["mod_tiny"], composed["dense_tiny"]
    assert isinstance(some.depth, MixtureOfDepthsConfig) and some.depth.capacity == 0.125
    assert some.model_copy(update={"depth": FullDepthConfig(), "layers": 4}) == dense
    between = sum(block_products(some, layer, 256) for layer in (1, 3, 5)) / block_products(some, 0, 256)
    assert 0.375 < between < 0.5
    flops = [count(config, 4096, 256).forward_flops_per_token for config in (some, dense)]
    assert 1.0 < flops[0] / flops[1] < 1.12


def test_a_model_without_depth_counts_as_ever() -> None:
    """Exact integers where there is nothing to share."""
    full = published(768)
    assert all(isinstance(block_products(full, layer, 128), int) for layer in (0, 1))
    assert count(deep(full, every=3), 100, 128) == count(full, 100, 128)
