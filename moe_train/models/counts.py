"""Parameters and FLOPs from the configuration alone, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.routing import HashRouterConfig, HierarchicalRouterConfig, NoisyTopKRouterConfig
from moe_train.config.schema import FFNConfig, ModelConfig
from moe_train.models.transformer import is_moe_layer


@dataclass(frozen=True)
class Counts:
    """The size of a model.

    Attributes:
        total: parameters over all experts, each stored once.
        active: parameters that a token uses: total without the experts that it does not visit.
        forward_flops_per_token: floating-point operations (a multiply-add is two) of the forward pass per token at the
            configured sequence length; attention over half the sequence on average, as it is causal.
        training_flops_per_token: the same of forward and backward, which costs twice the forward.
    """

    total: int
    active: int
    forward_flops_per_token: int

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward."""
        return 3 * self.forward_flops_per_token


def count(config: ModelConfig, vocab_size: int, seq_len: int) -> Counts:
    """Count a model.

    Args:
        config: the model.
        vocab_size: tokens V.
        seq_len: positions per sequence, for the FLOPs of attention.
    """
    width = config.dim // config.heads
    kv_heads = config.attention.kv_heads or config.heads
    attention = config.dim * width * (2 * config.heads + 2 * kv_heads)
    moe_layers = sum(is_moe_layer(config.ffn, layer) for layer in range(config.layers))
    dense = 3 * config.dim * config.ffn.hidden_dim * (config.layers - moe_layers)
    expert = 3 * config.dim * config.ffn.expert_dim
    always = (config.dim * router_rows(config.ffn) + config.ffn.num_shared_experts * expert) * moe_layers

    embedding = vocab_size * config.dim
    norms = (2 * config.layers + 1) * config.dim
    matrices = attention * config.layers + dense + always
    stored = matrices + config.ffn.num_experts * expert * moe_layers
    used = matrices + config.ffn.top_k * expert * moe_layers
    head = 0 if config.tie_embeddings else embedding

    scores = 4 * config.heads * width * seq_len // 2 * config.layers
    return Counts(
        total=stored + norms + embedding + head,
        active=used + norms + embedding + head,
        forward_flops_per_token=2 * (used + embedding) + scores,
    )


def router_rows(ffn: FFNConfig) -> int:
    """Return the number of vectors of width D that a router's parameters are."""
    match ffn.router:
        case HashRouterConfig():
            return 0
        case NoisyTopKRouterConfig():
            return 2 * ffn.num_experts
        case HierarchicalRouterConfig(groups=groups):
            return ffn.num_experts + groups
        case _:
            return ffn.num_experts
