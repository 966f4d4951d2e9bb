"""Small models from the command line's words, as the tests of models, engine and optimizer use them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_train.config.compose import compose_config
from moe_train.config.schema import ModelConfig, TrainConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

VOCAB, BATCH, LENGTH = 23, 2, 8
SMALL = (
    "model.dim=16", "model.layers=2", "model.heads=4", "model.attention.kv_heads=2", "model.init_std=0.3",
    "model.ffn.num_experts=4", "model.ffn.expert_dim=6", "model.ffn.hidden_dim=10",
)  # fmt: skip
VARIANTS = {
    "top-2": (),
    # Without jitter, which depends on a sequence's place in the batch.
    "top-1": ("model=switch_tiny", "model.ffn.capacity.kind=dropless", "model.ffn.router.jitter=0.0"),
    "capacity": ("model.ffn.capacity.kind=factor", "model.ffn.capacity.factor=0.8"),
    "dense": ("model=dense_tiny", "model.ffn.num_experts=0"),
    "every other layer, shared expert, untied": (
        "model.ffn.every=2", "model.ffn.num_shared_experts=2", "model.tie_embeddings=false"
    ),
}  # fmt: skip


@functools.cache
def config_of(*overrides: str) -> ModelConfig:
    """The small model with changes; rules across fields are not asked."""
    return compose_config("train", TrainConfig, lambda config: [], [*SMALL, *overrides]).model


def build(config: ModelConfig, precision: str = "fp64", seed: int = 0) -> Transformer:
    """A model with values and all its experts."""
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, VOCAB, exchange, precision, torch.device("cpu"))
    initialise(model, seed)
    return model


def random_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
