"""The blocks of a transformer, and those that look further ahead (multi-token prediction)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.models.attention import Attention
from moe_train.models.memory import Memory
from moe_train.models.modules import FeedForward
from moe_train.models.switchhead import Attended, SwitchHead
from moe_train.moe.context import RoutingContext
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer
from moe_train.moe.modules import Linear, build_norm
from moe_train.moe.record import ExpertLayer, LayerRecord
from moe_train.ops.rotary import Rotary


@dataclass(frozen=True)
class BlockOutput:
    """What a block returns.

    Attributes:
        x_BSD: [B, S, D] residual stream.
        records: sums of the block's layers with experts, in order of `TransformerBlock.expert_layers`.
    """

    x_BSD: Tensor
    records: tuple[LayerRecord, ...] = ()


class TransformerBlock(nn.Module, ABC):
    """What a transformer is made of."""

    @property
    @abstractmethod
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """What leaves a record, by `LayerKey.part`, in order of the records."""

    @property
    def inner(self) -> TransformerBlock:
        """The block that others stand around: itself, unless something does."""
        return self

    @abstractmethod
    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext, memory: Memory | None = None
    ) -> BlockOutput:
        """Apply to the residual stream.

        Args:
            x_BSD: [B, S, D].
            rotary: table of the positions; None where these enter elsewhere.
            context: of these tokens.
            memory: keys and values of earlier tokens, to which these are added; None: there are none.
        """


class Block(TransformerBlock):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        config: the model.
        attention: of one kind.
        ffn: a dense network or a layer with experts.
    """

    def __init__(
        self, config: ModelConfig, attention: Attention | SwitchHead, ffn: FeedForward | MoELayer | GraphLayer
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.attention = attention
        self.ffn_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.ffn = ffn

    @property
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """Those of attention, then the feed-forward part, where these have experts."""
        found: dict[str, ExpertLayer] = {}
        if isinstance(self.attention, SwitchHead):
            found |= self.attention.expert_layers
        if isinstance(self.ffn, MoELayer | GraphLayer):
            found[""] = self.ffn
        return found

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary | None,
        context: RoutingContext,
        memory: Memory | None = None,
        residual: bool = True,
    ) -> BlockOutput:
        """Apply to the residual stream [B, S, D]; without ``residual`` return only what is added to it."""
        attended = self.attend_any(x_BSD, rotary, context, memory)
        middle_BSD = x_BSD + attended.x_BSD
        base_BSD = middle_BSD if residual else attended.x_BSD
        if isinstance(self.ffn, MoELayer | GraphLayer):
            output = self.ffn(self.ffn_norm(middle_BSD), context)
            return BlockOutput(base_BSD + output.y_BSD, (*attended.records, output.record))
        return BlockOutput(base_BSD + self.feed(middle_BSD), attended.records)

    def attend_any(
        self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext, memory: Memory | None = None
    ) -> BlockOutput:
        """Return what attention, of whatever kind, adds to the residual stream [B, S, D]."""
        if isinstance(self.attention, SwitchHead):
            attended: Attended = self.attention(self.attention_norm(x_BSD), rotary, context, memory)
            return BlockOutput(attended.y_BSD, attended.records)
        return BlockOutput(self.attend(x_BSD, rotary, memory, context.valid_BS))

    def attend(
        self, x_BSD: Tensor, rotary: Rotary | None, memory: Memory | None = None, valid_BS: Tensor | None = None
    ) -> Tensor:
        """Return what attention without experts adds to [B, S, D]. Its shapes are those of the batch."""
        added_BSD: Tensor = self.attention(self.attention_norm(x_BSD), rotary, memory, valid_BS)
        return added_BSD

    def feed(self, x_BSD: Tensor) -> Tensor:
        """Return what a dense network adds to the residual stream [B, S, D]. Its shapes are those of the batch."""
        added_BSD: Tensor = self.ffn(self.ffn_norm(x_BSD))
        return added_BSD


class CoupledBlocks(TransformerBlock):
    """x + coupling(block_1(x), ..., block_E(x)): the place of one block taken by E of them (GNN-MoE, phase 1).

    Each block has residual connections of its own, inside of the one around them all.

    Args:
        layer: whose experts are blocks.
    """

    def __init__(self, layer: GraphLayer) -> None:
        super().__init__()
        self.layer = layer

    @property
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """The layer that couples them."""
        return {"": self.layer}

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary | None,
        context: RoutingContext,
        memory: Memory | None = None,
        residual: bool = True,
    ) -> BlockOutput:
        """Apply to the residual stream [B, S, D]; without ``residual`` return only what is added. Remembers nothing."""
        assert memory is None, "a memory has room for one attention per block"
        output = self.layer(x_BSD, context, rotary)
        return BlockOutput(x_BSD + output.y_BSD if residual else output.y_BSD, (output.record,))


class MTPModule(nn.Module):
    """One more block that sees one token further ahead (DeepSeek-V3, arXiv 2412.19437, eq. 21 to 23).

    Its output is normed, like the model's, before the shared head scores it and the next module takes it; so do
    transformers and vLLM with the published weights.

    Args:
        config: the model.
        block: the block.
    """

    def __init__(self, config: ModelConfig, block: TransformerBlock) -> None:
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
        return BlockOutput(self.norm(output.x_BSD), output.records)
