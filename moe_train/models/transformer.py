"""The decoder-only transformer of every family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.models.attention import rotary_width
from moe_train.models.blocks import Block, BlockOutput, MTPModule
from moe_train.models.modules import FeedForward, Linear, RMSNorm, SharedExperts
from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext, ahead
from moe_train.moe.exchange import Exchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.roles import Kind, Role
from moe_train.moe.routers import build_router
from moe_train.ops.rotary import Rotary, rotary_table


@dataclass(frozen=True)
class ModelOutput:
    """What the model returns.

    Attributes:
        logits_BSV: [B, S, V] scores of the next token, in the dtype of the activations.
        records: the router's sums of each MoE layer, in order of depth, then of the modules of multi-token prediction;
            empty for a dense model.
        mtp_logits: per module of multi-token prediction [B, S, V]: module k (from 0) scores at position i the token
            i + k + 2. Only in training; the last k + 1 positions mean nothing.
    """

    logits_BSV: Tensor
    records: tuple[RoutingRecord, ...]
    mtp_logits: tuple[Tensor, ...] = ()


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
        self.mtp = nn.ModuleList(
            MTPModule(config, build_block(config, config.layers + k, exchange)) for k in range(config.mtp.depth)
        )

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by their depth, in the order of `ModelOutput.records`."""
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        found = ((depth, block.ffn) for depth, block in enumerate(blocks) if isinstance(block, Block))
        return {depth: ffn for depth, ffn in found if isinstance(ffn, MoELayer)}

    def forward(self, tokens_BS: Tensor, context: RoutingContext | None = None) -> ModelOutput:
        """Score the next token at each position.

        Args:
            tokens_BS: [B, S] int64.
            context: of the same tokens: padding, place in the global batch, draws; None: a batch of its own, all valid.
        """
        context = context or RoutingContext.of(tokens_BS)
        precise = torch.promote_types(self.dtype, torch.float32)
        width = rotary_width(self.config)
        rotary = rotary_table(tokens_BS.shape[1], width, self.config.attention, precise, tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        records = []
        for depth, block in enumerate(self.blocks):
            output: BlockOutput = block(x_BSD, rotary, context.at_layer(depth))
            x_BSD = output.x_BSD
            records.append(output.record)
        x_BSD = self.norm(x_BSD)
        outputs = self.look_ahead(x_BSD, tokens_BS, rotary, context) if self.training else []
        records += [output.record for output in outputs]
        return ModelOutput(
            logits_BSV=self.score(x_BSD),
            records=tuple(record for record in records if record is not None),
            mtp_logits=tuple(self.score(output.x_BSD) for output in outputs),
        )

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Return the tokens' vectors [B, S, D]."""
        return F.embedding(tokens_BS, self.embedding_VD).to(self.dtype)

    def score(self, x_BSD: Tensor) -> Tensor:
        """Return the logits [B, S, V] of normed vectors."""
        if self.head is None:
            return F.linear(x_BSD, self.embedding_VD.to(self.dtype))
        logits_BSV: Tensor = self.head(x_BSD)
        return logits_BSV

    def look_ahead(
        self, x_BSD: Tensor, tokens_BS: Tensor, rotary: Rotary, context: RoutingContext
    ) -> list[BlockOutput]:
        """Run the modules of multi-token prediction one after the other, from the model's normed output [B, S, D]."""
        outputs: list[BlockOutput] = []
        for k, module in enumerate(self.mtp):
            embedded_BSD = self.embed(ahead(tokens_BS, k + 1))
            place = context.ahead(k + 1).at_layer(self.config.layers + k)
            outputs.append(module(outputs[-1].x_BSD if outputs else x_BSD, embedded_BSD, rotary, place))
        return outputs


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
    """Whether layer number ``layer`` (from 0) is MoE: after the first dense ones, the last of each ``every``."""
    return config.num_experts > 0 and layer >= config.first_dense and (layer + 1) % config.every == 0


def build_block(config: ModelConfig, layer: int, exchange: Exchange) -> Block:
    """Build one block by the layer pattern."""
    # GPT-2: what writes into the residual stream starts smaller, by the root of the number of writers.
    out_std = config.init_std / (2 * config.layers) ** 0.5
    ffn: FeedForward | MoELayer
    if is_moe_layer(config.ffn, layer):
        ffn = build_moe(config, exchange, out_std)
    else:
        ffn = FeedForward(config.dim, config.ffn.hidden_dim, config.ffn.activation, config.init_std, out_std)
    return Block(config, layer, ffn, out_std)


def build_moe(config: ModelConfig, exchange: Exchange, out_std: float) -> MoELayer:
    """Build the MoE layer that the configuration describes, with the experts that the exchange keeps here."""
    ffn = config.ffn
    return MoELayer(
        router=build_router(ffn, config.dim, config.init_std),
        capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k),
        exchange=exchange,
        experts=Experts(
            config.dim,
            ffn.expert_dim,
            exchange.experts,
            config.init_std,
            out_std,
            ffn.expert_activation or ffn.activation,
            ffn.expert_bias,
        ),
        balance=Balance(ffn),
        shared=build_shared(config, out_std),
    )


def build_shared(config: ModelConfig, out_std: float) -> SharedExperts | None:
    """Build the network that every token visits in a MoE layer, if there is one."""
    ffn = config.ffn
    width = shared_width(ffn)
    if width == 0:
        return None
    return SharedExperts(config.dim, width, ffn.activation, config.init_std, out_std, ffn.shared_gate)


def shared_width(ffn: FFNConfig) -> int:
    """Return the joint hidden width of the shared experts; 0: there are none."""
    return ffn.num_shared_experts * (ffn.shared_dim or ffn.expert_dim)
