"""Small models from the command line's words, as the tests of models, engine and optimizer use them."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

Module = TypeVar("Module", bound=nn.Module)
VOCAB, BATCH, LENGTH = 23, 2, 8
SMALL = (
    "model.dim=16", "model.layers=2", "model.heads=4", "model.attention.kv_heads=2", "model.init_std=0.3",
    "model.ffn.num_experts=4", "model.ffn.expert_dim=6", "model.ffn.hidden_dim=10",
)  # fmt: skip
LATENT = (
    "model.attention.kv_rank=6", "model.attention.nope_dim=3", "model.attention.rope_dim=4", "model.attention.v_dim=5",
    "~model.attention.kv_heads",
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

FEATURES = {
    "latent attention": ("model.attention.kind=mla", *LATENT, "model.norm_eps=1e-6"),
    "compressed queries, YaRN, groups, first dense": (
        "model.attention.kind=mla", *LATENT, "model.attention.q_rank=5", "model.attention.yarn.factor=8.0",
        "model.attention.yarn.original_length=16", "model.attention.yarn.mscale_all_dim=0.7", "model.layers=3",
        "model.ffn.router.kind=group_limited", "model.ffn.router.groups=2", "model.ffn.router.top_groups=1",
        "+model.ffn.balance.loss_free.rate=0.1", "model.ffn.first_dense=1", "model.ffn.num_shared_experts=1",
    ),
    "window, sinks, biases everywhere": (
        "model.attention.window=3", "model.attention.full_every=2", "model.attention.sinks=true",
        "model.attention.qkv_bias=true", "model.attention.out_bias=true", "model.attention.head_dim=6",
        "model.ffn.activation=swiglu_clamped", "model.ffn.expert_bias=true", "model.ffn.router.kind=topk_softmax",
        "model.ffn.router.bias=true",
    ),
    "norms of heads, shared gate": (
        "model.attention.qk_norm=head", "model.attention.head_dim=10", "model.ffn.num_shared_experts=1",
        "model.ffn.shared_dim=7", "model.ffn.shared_gate=true", "model.ffn.router.normalize=none",
    ),
    "norms over all heads, no gate": (
        "model.attention.qk_norm=full", "model.ffn.activation=gelu", "model.ffn.expert_activation=relu",
        "model.ffn.every=2",
    ),
    "two tokens further ahead": ("model.mtp.depth=2", "model.ffn.every=2", "model.tie_embeddings=false"),
}  # fmt: skip
"""What published models have beside the above."""


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


def random(*shape: int, seed: int = 9) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: Module, dtype: torch.dtype = torch.float64) -> Module:
    """The module with normal numbers for parameters, none of them like another."""
    for place, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=place).to(dtype)
    return module
