"""The blocks of a transformer, and those that look further ahead (multi-token prediction)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.models.attention import build_attention
from moe_train.models.modules import FeedForward
from moe_train.moe.context import RoutingContext
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer
from moe_train.moe.modules import Linear, build_norm
from moe_train.moe.record import LayerRecord
from moe_train.ops.rotary import Rotary


@dataclass(frozen=True)
class BlockOutput:
    """What a block returns.

    Attributes:
        x_BSD: [B, S, D] residual stream.
        record: sums of a block with experts; None for a dense one.
    """

    x_BSD: Tensor
    record: LayerRecord | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        config: the model.
        layer: depth of the block, from 0.
        ffn: a dense network or a layer with experts.
        out_std: standard deviation of the initial values of the attention's output projection.
    """

    def __init__(
        self, config: ModelConfig, layer: int, ffn: FeedForward | MoELayer | GraphLayer, out_std: float
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.attention = build_attention(config, layer, out_std)
        self.ffn_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext) -> BlockOutput:
        """Apply to the residual stream [B, S, D] of the tokens that ``context`` describes."""
        x_BSD = x_BSD + self.attend(x_BSD, rotary)
        if isinstance(self.ffn, MoELayer | GraphLayer):
            output = self.ffn(self.ffn_norm(x_BSD), context)
            return BlockOutput(x_BSD + output.y_BSD, output.record)
        return BlockOutput(x_BSD + self.feed(x_BSD), None)

    def attend(self, x_BSD: Tensor, rotary: Rotary | None) -> Tensor:
        """Return what attention adds to the residual stream [B, S, D]. Its shapes are those of the batch."""
        added_BSD: Tensor = self.attention(self.attention_norm(x_BSD), rotary)
        return added_BSD

    def feed(self, x_BSD: Tensor) -> Tensor:
        """Return what a dense network adds to the residual stream [B, S, D]. Its shapes are those of the batch."""
        added_BSD: Tensor = self.ffn(self.ffn_norm(x_BSD))
        return added_BSD


class CoupledBlocks(nn.Module):
    """x + coupling(block_1(x), ..., block_E(x)): the place of one block taken by E of them (GNN-MoE, phase 1).

    Each block has residual connections of its own, inside of the one around them all.

    Args:
        layer: whose experts are blocks.
    """

    def __init__(self, layer: GraphLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext) -> BlockOutput:
        """Apply to the residual stream [B, S, D] of the tokens that ``context`` describes."""
        output = self.layer(x_BSD, context, rotary)
        return BlockOutput(x_BSD + output.y_BSD, output.record)


class MTPModule(nn.Module):
    """One more block that sees one token further ahead (DeepSeek-V3, arXiv 2412.19437, eq. 21 to 23).

    Its output is normed, like the model's, before the shared head scores it and the next module takes it; so do
    transformers and vLLM with the published weights.

    Args:
        config: the model.
        block: the block.
    """

    def __init__(self, config: ModelConfig, block: Block | CoupledBlocks) -> None:
        super().__init__()
        self.embedding_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.hidden_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.project = Linear(2 * config.dim, config.dim, config.init_std)
        self.block = block
        self.norm = build_norm(config.norm, config.dim, config.norm_eps)

    def forward(
        self, hidden_BSD: Tensor, embedded_BSD: Tensor, rotary: Rotary | None, context: RoutingContext
    ) -> BlockOutput:
        """Look one token further ahead.

        Args:
            hidden_BSD: [B, S, D] normed output of the model or of the previous module.
            embedded_BSD: [B, S, D] embeddings of the tokens that this module sees in addition.
            rotary: table of the positions.
            context: of these tokens.
        """
        joined = torch.cat([self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        output: BlockOutput = self.block(self.project(joined), rotary, context)
        return BlockOutput(self.norm(output.x_BSD), output.record)
