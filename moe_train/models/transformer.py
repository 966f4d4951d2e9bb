"""The transformer of every family, as a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import ModelConfig
from moe_train.models.attention import rotary_width
from moe_train.models.blocks import BlockOutput, MTPModule, TransformerBlock
from moe_train.models.build import build_block, has_last_norm
from moe_train.models.memory import TextMemory
from moe_train.moe.context import RoutingContext, ahead
from moe_train.moe.exchange import Exchange
from moe_train.moe.layer import MoELayer
from moe_train.moe.modules import Linear, build_norm
from moe_train.moe.record import ExpertLayer, LayerKey, LayerRecord
from moe_train.moe.roles import Kind, Role
from moe_train.ops.linear_loss import linear_cross_entropy_sum
from moe_train.ops.loss import cross_entropy_sum
from moe_train.ops.rotary import Rotary, rotary_table


@dataclass(frozen=True)
class Answer:
    """What every model returns.

    Attributes:
        records: the sums of each layer with experts, in order of `Transformer.expert_layers`; empty for a dense model.
    """

    records: tuple[LayerRecord, ...] = field(kw_only=True)


@dataclass(frozen=True)
class ModelOutput(Answer):
    """What a language model returns.

    Attributes:
        logits_BSV: [B, S, V] scores of the next token, in the dtype of the activations.
        mtp_logits: per module of multi-token prediction [B, S, V]: module k (from 0) scores at position i the token
            i + k + 2. Only in training; the last k + 1 positions mean nothing.
    """

    logits_BSV: Tensor
    mtp_logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ModelLosses(Answer):
    """What a model returns to whoever gives it the targets.

    Attributes:
        loss_sums: summed cross-entropy in nats, scalars of at least fp32: the model's, then that of each module of
            multi-token prediction; empty if no targets were given.
    """

    loss_sums: tuple[Tensor, ...]


@dataclass(frozen=True)
class Passed:
    """What the blocks made of tokens, and the tokens.

    Attributes:
        x_BSD: [B, S, D] normed output of the last block.
        tokens_BS: [B, S] int64, the tokens that the model was given.
        given: their context.
        context: of those that passed.
        rotary: table of their positions; None: these enter elsewhere.
        records: of the blocks' layers with experts.
    """

    x_BSD: Tensor
    tokens_BS: Tensor
    given: RoutingContext
    context: RoutingContext
    rotary: Rotary | None
    records: tuple[LayerRecord, ...]


class Transformer(nn.Module):
    """Token embedding, blocks, final norm, head. Parameters hold no values until `initialise` fills them.

    Args:
        config: the model.
        vocab_size: tokens V.
        exchange: brings tokens to experts; it also says which experts this rank holds.
        dtype: of the activations. Parameters keep theirs and are cast where they are used.

    Attributes:
        loss_chunk: tokens whose logits exist at one time where losses are asked for; None: all of a pass.
    """

    positions_SD: nn.Parameter | None
    head: Linear | MoELayer | None

    def __init__(self, config: ModelConfig, vocab_size: int, exchange: Exchange, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.loss_chunk: int | None = None
        self.embedding_VD = nn.Parameter(torch.empty(vocab_size, config.dim))
        learned = nn.Parameter(torch.empty(config.max_positions, config.dim)) if config.max_positions else None
        self.register_parameter("positions_SD", learned)
        self.roles = {name: Role(Kind.DENSE, config.init_std) for name in ("embedding_VD", "positions_SD")}
        self.blocks = nn.ModuleList(build_block(config, layer, exchange) for layer in range(config.layers))
        has_norm = has_last_norm(config)
        self.norm = build_norm(config.norm, config.dim, config.norm_eps) if has_norm else nn.Identity()
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.dim, vocab_size, config.init_std, config.head_bias)
        self.mtp = nn.ModuleList(
            MTPModule(config, build_block(config, config.layers + k, exchange)) for k in range(config.mtp.depth)
        )

    @property
    def all_blocks(self) -> list[TransformerBlock]:
        """The blocks in order of depth, then those of the modules of multi-token prediction."""
        return [*self.blocks, *(module.block for module in self.mtp)]

    @property
    def moe_layers(self) -> dict[int, ExpertLayer]:
        """The feed-forward layers with experts by their depth."""
        return {key.depth: layer for key, layer in self.expert_layers.items() if not key.part}

    @property
    def expert_layers(self) -> dict[LayerKey, ExpertLayer]:
        """All that leaves a record, in the order of `ModelOutput.records`."""
        blocks = enumerate(self.all_blocks)
        own = {LayerKey(depth, part): layer for depth, block in blocks for part, layer in block.expert_layers.items()}
        return own | self.outer_layers

    @property
    def outer_layers(self) -> dict[LayerKey, ExpertLayer]:
        """Those that are in no block: the head of some classifiers."""
        return {}

    def forward(
        self,
        tokens_BS: Tensor,
        context: RoutingContext | None = None,
        targets: Sequence[Tensor] | None = None,
        memory: TextMemory | None = None,
    ) -> Answer:
        """Score the next token at each position.

        Args:
            tokens_BS: [B, S] int64.
            context: of the same tokens: padding, place in the global batch, draws; None: a batch of its own, all valid.
            targets: None: logits are returned. Else losses are, and no logits outlive this: [B, S] labels for the model
                and, in training, for each module of multi-token prediction; or none at all, and nothing is scored.
            memory: of the text so far, which these tokens continue and are added to; in evaluation. None: they begin
                a text.
        """
        first = 0 if memory is None else memory.length
        rotary = self.rotations(tokens_BS, first)
        given = context or RoutingContext.of(tokens_BS)
        x_BSD, context = self.seen(self.vectors(tokens_BS), given)
        x_BSD = self.placed(x_BSD, first)
        records: list[LayerRecord] = []
        for depth, block in enumerate(self.blocks):
            place = context.at_layer(depth)
            output: BlockOutput = block(x_BSD, rotary, place, None if memory is None else memory.blocks[depth])
            x_BSD = output.x_BSD
            records += output.records
        if memory is not None:
            memory.length += tokens_BS.shape[1]
        return self.answer(Passed(self.norm(x_BSD), tokens_BS, given, context, rotary, tuple(records)), targets)

    def seen(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingContext]:
        """Return the vectors [B, S, D] of the tokens that pass the blocks, and their context: all."""
        return x_BSD, context

    def answer(self, passed: Passed, targets: Sequence[Tensor] | None) -> Answer:
        """Return logits or losses of what passed the blocks: `ModelOutput` or `ModelLosses`, as `forward` says."""
        outputs = self.look_ahead(passed) if self.training else []
        found = (*passed.records, *(record for output in outputs for record in output.records))
        hidden = [passed.x_BSD, *(output.x_BSD for output in outputs)]
        if targets is not None:
            assert len(targets) in (0, len(hidden)), "targets are for the model and for each module that looks ahead"
            return ModelLosses(tuple(map(self.loss_sum, hidden, targets)) if targets else (), records=found)
        logits_BSV, *ahead_BSV = map(self.score, hidden)
        return ModelOutput(logits_BSV, tuple(ahead_BSV), records=found)

    def vectors(self, tokens_BS: Tensor) -> Tensor:
        """Return the tokens' vectors [B, S, D] in the dtype of the weights, wherever they stand."""
        return F.embedding(tokens_BS, self.embedding_VD)

    def placed(self, x_BSD: Tensor, first: int = 0) -> Tensor:
        """Return tokens' vectors as blocks take them; learned positions, from ``first`` on, are added."""
        if self.positions_SD is not None:
            x_BSD = x_BSD + self.positions_SD[first : first + x_BSD.shape[1]]
        return x_BSD.to(self.dtype)

    def rotations(self, tokens_BS: Tensor, first: int = 0) -> Rotary | None:
        """Return the table of rotary positions from ``first`` on; None where positions are learned or nobody asks."""
        if self.positions_SD is not None or not self.blocks:
            return None
        precise = torch.promote_types(self.dtype, torch.float32)
        width = rotary_width(self.config)
        length, device = tokens_BS.shape[1], tokens_BS.device
        return rotary_table(length, width, self.config.attention, precise, device, first)

    def score(self, x_BSD: Tensor) -> Tensor:
        """Return the logits [..., V] of normed vectors [..., D]."""
        if self.head is None:
            return F.linear(x_BSD, self.embedding_VD.to(self.dtype))
        logits_BSV: Tensor = self.head(x_BSD)
        return logits_BSV

    def loss_sum(self, x_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the summed cross-entropy of normed vectors and labels [B, S], a scalar of at least fp32."""
        x_TD, labels_T = x_BSD.flatten(0, 1), labels_BS.flatten()
        if self.loss_chunk is None and torch.finfo(self.dtype).bits >= 32:
            return cross_entropy_sum(self.score(x_TD), labels_T)
        assert not isinstance(self.head, MoELayer), "experts score texts, not tokens"
        # In bf16 also where it is one chunk: logits are read and written less often than with fp32 copies.
        weight_VD = self.embedding_VD if self.head is None else self.head.weight
        bias_V = None if self.head is None else self.head.bias
        return linear_cross_entropy_sum(x_TD, weight_VD, bias_V, labels_T, self.loss_chunk)

    def look_ahead(self, passed: Passed) -> list[BlockOutput]:
        """Run the modules of multi-token prediction one after the other, from the model's normed output."""
        outputs: list[BlockOutput] = []
        for k, module in enumerate(self.mtp):
            embedded_BSD = self.placed(self.vectors(ahead(passed.tokens_BS, k + 1)))
            place = passed.context.ahead(k + 1).at_layer(self.config.layers + k)
            before_BSD = outputs[-1].x_BSD if outputs else passed.x_BSD
            outputs.append(module(before_BSD, embedded_BSD, passed.rotary, place))
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
        return kind_of(config)(config, vocab_size, exchange, formats.activations).to(formats.weights)


def kind_of(config: ModelConfig) -> type[Transformer]:
    """Return the class of a model: a language model, or what tells the class of a text."""
    if config.classifier is None:
        return Transformer
    from moe_train.models.classifier import TextClassifier  # which is made of the class above

    return TextClassifier
