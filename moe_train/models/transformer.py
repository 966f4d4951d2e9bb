"""The decoder-only transformer of every family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.schema import FFNConfig, ModelConfig
from moe_train.models.blocks import Block, Linear, RMSNorm, SwiGLU
from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import Exchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.roles import Kind, Role
from moe_train.moe.routers import build_router
from moe_train.ops.attention import rotary_angles


@dataclass(frozen=True)
class ModelOutput:
    """What the model returns.

    Attributes:
        logits_BSV: [B, S, V] scores of the next token, in the dtype of the activations.
        records: the router's sums of each MoE layer, in order of depth; empty for a dense model.
    """

    logits_BSV: Tensor
    records: tuple[RoutingRecord, ...]


class Transformer(nn.Module):
    """Token embedding, blocks, final norm, head. Parameters hold no values until `initialise` fills them.

    Args:
        config: the model.
        vocab_size: tokens V.
        exchange: brings tokens to experts; it also says which experts this rank holds.
        dtype: of the activations. Parameters keep theirs and are cast where they are used.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, exchange: Exchange, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding_VD = nn.Parameter(torch.empty(vocab_size, config.dim))
        self.roles = {"embedding_VD": Role(Kind.DENSE, config.init_std)}
        self.blocks = nn.ModuleList(build_block(config, layer, exchange) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, vocab_size, config.init_std)

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by their depth, in the order of `ModelOutput.records`."""
        found = ((depth, block.ffn) for depth, block in enumerate(self.blocks) if isinstance(block, Block))
        return {depth: ffn for depth, ffn in found if isinstance(ffn, MoELayer)}

    def forward(self, tokens_BS: Tensor, context: RoutingContext | None = None) -> ModelOutput:
        """Score the next token at each position.

        Args:
            tokens_BS: [B, S] int64.
            context: of the same tokens: padding, place in the global batch, draws; None: a batch of its own, all valid.
        """
        context = context or RoutingContext.of(tokens_BS)
        angles_SW = rotary_angles(
            tokens_BS.shape[1],
            self.config.dim // self.config.heads,
            self.config.attention.rope_theta,
            tokens_BS.device,
        )
        precise = torch.promote_types(self.dtype, torch.float32)
        cos_SW, sin_SW = angles_SW.cos().to(precise), angles_SW.sin().to(precise)
        x_BSD = F.embedding(tokens_BS, self.embedding_VD).to(self.dtype)
        records = []
        for depth, block in enumerate(self.blocks):
            output = block(x_BSD, cos_SW, sin_SW, context.at_layer(depth))
            x_BSD = output.x_BSD
            if output.record is not None:
                records.append(output.record)
        x_BSD = self.norm(x_BSD)
        logits_BSV = F.linear(x_BSD, self.embedding_VD.to(self.dtype)) if self.head is None else self.head(x_BSD)
        return ModelOutput(logits_BSV, tuple(records))


@dataclass(frozen=True)
class Precision:
    """Number formats by the value of ``train.precision``.

    Attributes:
        weights: of weights, gradients and optimizer state (bf16 keeps fp32 masters).
        activations: of what flows through the model.
    """

    weights: torch.dtype
    activations: torch.dtype


PRECISIONS = {
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp32": Precision(torch.float32, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}


def build_model(
    config: ModelConfig, vocab_size: int, exchange: Exchange, precision: str, device: torch.device
) -> Transformer:
    """Return a model on a device, without values, holding the experts that the exchange keeps here."""
    formats = PRECISIONS[precision]
    with device:
        return Transformer(config, vocab_size, exchange, formats.activations).to(formats.weights)


def is_moe_layer(config: FFNConfig, layer: int) -> bool:
    """Whether layer number ``layer`` (from 0) is MoE: the last of each group of ``every``."""
    return config.num_experts > 0 and (layer + 1) % config.every == 0


def build_block(config: ModelConfig, layer: int, exchange: Exchange) -> Block:
    """Build one block by the layer pattern."""
    # GPT-2: what writes into the residual stream starts smaller, by the root of the number of writers.
    out_std = config.init_std / (2 * config.layers) ** 0.5
    ffn: SwiGLU | MoELayer
    if is_moe_layer(config.ffn, layer):
        ffn = build_moe(config, exchange, out_std)
    else:
        ffn = SwiGLU(config.dim, config.ffn.hidden_dim, config.init_std, out_std)
    return Block(config, ffn, out_std)


def build_moe(config: ModelConfig, exchange: Exchange, out_std: float) -> MoELayer:
    """Build the MoE layer that the configuration describes, with the experts that the exchange keeps here."""
    ffn = config.ffn
    shared_dim = ffn.num_shared_experts * ffn.expert_dim
    return MoELayer(
        router=build_router(ffn, config.dim, config.init_std),
        capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k),
        exchange=exchange,
        experts=Experts(config.dim, ffn.expert_dim, exchange.experts, config.init_std, out_std),
        balance=Balance(ffn),
        shared=SwiGLU(config.dim, shared_dim, config.init_std, out_std) if shared_dim else None,
    )
