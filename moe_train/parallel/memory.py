"""What a rank keeps of a training's state, in closed form: from the configuration and the layout alone."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.attention import SwitchHeadConfig
from moe_train.config.classifier import ExpertHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.dist.mesh import Layout
from moe_train.models.build import is_moe_layer
from moe_train.models.counts import count, head_size
from moe_train.models.sizes import (
    attention_size,
    block_size,
    head_experts_size,
    matrix,
    network_size,
    norm_size,
    router_size,
    times,
)
from moe_train.models.transformer import PRECISIONS

MOMENTS = 2
"""Numbers of optimizer state per weight: AdamW's two moments."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations, buffers of collectives and what torch itself takes come on top.

    Shards are taken to be even; one of a tensor that does not divide is up to a row larger.

    Attributes:
        weights_bytes: of the weights kept here, which bf16 keeps in fp32.
        gradients_bytes: of their gradients.
        optimizer_bytes: of AdamW's moments.
        gathered_bytes: of what is whole at one time beside the shards: what the model holds outside its blocks, and its
            largest block; once more for their gradients in the backward pass. 0 without sharding.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int

    @property
    def state_bytes(self) -> int:
        """What is kept from step to step."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Values:
    """Numbers of weights by who holds them.

    Attributes:
        dense: of those that serve every token, routers included.
        experts: of those of all experts.
    """

    dense: int
    experts: int


def memory_per_rank(config: ModelConfig, vocab_size: int, layout: Layout, precision: str, overlap: int = 1) -> Memory:
    """Return what a rank of torch's engine keeps.

    Args:
        config: the model.
        vocab_size: tokens of the tokenizer; model.vocab_size, where stated, comes first.
        layout: over how many ranks what is cut.
        precision: ``train.precision``.
        overlap: ``parallel.overlap``, on which it depends how experts' weights travel.
    """
    kept_bytes = PRECISIONS[precision].weights.itemsize
    whole = values_of_model(config, vocab_size)
    held = whole.dense // layout.dp_shard + whole.experts // (layout.ep * layout.expert_shard)
    gathered_bytes = largest_gathered(config, vocab_size, layout, precision, overlap) if layout.dp_shard > 1 else 0
    return Memory(held * kept_bytes, held * kept_bytes, MOMENTS * held * kept_bytes, gathered_bytes)


def values_of_model(config: ModelConfig, vocab_size: int) -> Values:
    """Return the weights of the whole model."""
    experts = sum(values_of_block(config, layer).experts for layer in range(config.layers + config.mtp.depth))
    experts += values_of_head(config).experts
    return Values(count(config, vocab_size, seq_len=1).total - experts, experts)


def values_of_head(config: ModelConfig) -> Values:
    """Return the weights of a classifier's head."""
    stored = head_size(config).stored
    dense = router_size(config.dim, config.ffn).stored if isinstance(config.classifier, ExpertHeadConfig) else stored
    return Values(dense, stored - dense)


def values_of_block(config: ModelConfig, layer: int) -> Values:
    """Return the weights of one block, those of modules for multi-token prediction included."""
    stored, held = block_size(config, layer).stored, values_of_head_experts(config)
    ffn = config.ffn
    if not is_moe_layer(ffn, layer):
        return Values(stored - held, held)
    expert = network_size(config.dim, ffn.expert_dim, ffn.expert_activation or ffn.activation, ffn.expert_bias).stored
    if ffn.graph is not None and ffn.graph.expert == "block":
        expert += times(2, norm_size(config)).stored + attention_size(config).stored
    held += ffn.num_experts * expert
    return Values(stored - held, held)


def largest_gathered(config: ModelConfig, vocab_size: int, layout: Layout, precision: str, overlap: int) -> int:
    """Return the bytes of what stays gathered through a pass, and of the largest block with the module around it."""
    formats = PRECISIONS[precision]
    casts_experts = config.ffn.graph is None and overlap == 1
    expert_bytes = (formats.activations if casts_experts else formats.weights).itemsize
    dense_bytes = formats.weights.itemsize
    head = values_of_head(config).experts
    around = count(config, vocab_size, seq_len=1).total - head
    largest = head // layout.ep * expert_bytes
    for layer in range(config.layers + config.mtp.depth):
        block = values_of_block(config, layer)
        dense = block.dense + (values_around_block(config) if layer >= config.layers else 0)
        around -= dense + block.experts
        largest = max(largest, dense * dense_bytes + largest_experts(config, block) // layout.ep * expert_bytes)
    return around * dense_bytes + largest


def largest_experts(config: ModelConfig, block: Values) -> int:
    """Return how many of a block's expert weights are whole at one time: each layer's are dropped before the next."""
    sides = values_of_head_experts(config)
    return max(block.experts - sides, sides // 2)


def values_of_head_experts(config: ModelConfig) -> int:
    """Return the weights of the experts on both sides of a block's attention, where it has some."""
    attention = config.attention
    return head_experts_size(config, attention).stored if isinstance(attention, SwitchHeadConfig) else 0


def values_around_block(config: ModelConfig) -> int:
    """Return the weights of a module for multi-token prediction outside its block."""
    return times(3, norm_size(config)).stored + matrix(config.dim, 2 * config.dim).stored
