"""Parameters and FLOPs of a model from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from moe_train.config.classifier import ExpertHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.models.build import has_last_norm
from moe_train.models.lexicon import SIGNS
from moe_train.models.sizes import (
    Size,
    block_products,
    block_size,
    matrix,
    mtp_size,
    norm_size,
    router_size,
    score_flops,
    times,
    tokens_taken,
    total,
    vector,
)


@dataclass(frozen=True)
class Counts:
    """The size of a model.

    A floating-point operation is half a multiply-add; norms, activations and softmaxes are left out. A token sees half
    of its sequence on average, or what its window holds; all of it where attention is not causal. A classifier's head
    works once per sequence, and its output is no embedding.

    Attributes:
        total: parameters that are stored and trained: each expert once, multi-token prediction included.
        mtp: those of the modules that predict further tokens, which only training uses.
        active: parameters that a token uses at inference: K of the E experts, input embedding included. Where blocks
            take only some tokens, it is one that all of them take.
        active_without_embedding: the same without the input embedding but with the head, as OpenAI counts (gpt-oss
            model card, table 1); where they are one matrix, it is the head and counts.
        forward_flops_per_token: of inference, at the configured sequence length: the mean over a sequence. Where blocks
            take only some tokens, as many as in training.
        mtp_flops_per_token: what the modules add to the forward pass of training, products with the head included; the
            positions at the end of a sequence that have nothing to predict are counted as the others.
    """

    total: int
    mtp: int
    active: int
    active_without_embedding: int
    forward_flops_per_token: float
    mtp_flops_per_token: float

    @property
    def main(self) -> int:
        """Parameters without multi-token prediction: what published tables count."""
        return self.total - self.mtp

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward, which costs twice the forward."""
        return 3 * (self.forward_flops_per_token + self.mtp_flops_per_token)


def count(config: ModelConfig, vocab_size: int, seq_len: int) -> Counts:
    """Count a model.

    Args:
        config: the model.
        vocab_size: tokens of the tokenizer; model.vocab_size, where stated, comes first.
        seq_len: positions per sequence, for the FLOPs of attention.
    """
    rows = config.vocab_size or vocab_size
    embedding, positions = rows * config.dim, (config.max_positions or 0) * config.dim
    head_bias = rows if config.head_bias else 0
    blocks = total(block_size(config, layer) for layer in range(config.layers))
    blocks += norm_size(config) if has_last_norm(config) else Size()
    modules, depth, head = mtp_size(config), config.mtp.depth, head_size(config)
    matrices = (
        table_parameters(config) + positions + head_bias + (embedding if config.tie_embeddings else 2 * embedding)
    )
    output = 0 if config.classifier else embedding + head_bias
    per_token = head.multiplied / seq_len if config.classifier else embedding
    return Counts(
        total=blocks.stored + matrices + modules.stored + head.stored,
        mtp=modules.stored,
        active=blocks.used + matrices + head.used,
        active_without_embedding=blocks.used + output + head.used,
        forward_flops_per_token=flops(config, range(config.layers), per_token, seq_len),
        mtp_flops_per_token=flops(
            config,
            range(config.layers, config.layers + depth),
            depth * (embedding + 2 * config.dim**2),  # the head, and the projection of both inputs
            seq_len,
        ),
    )


def table_parameters(config: ModelConfig) -> int:
    """Return the entries of a classifier's tables of runs of tokens; they are looked up, as an embedding is."""
    head = config.classifier
    if head is None:
        return 0
    vectors = head.ngrams.rows * config.dim if head.ngrams else 0
    rows = (head.naive_bayes.rows if head.naive_bayes else 0) + (len(SIGNS) if head.lexicon else 0)
    return vectors + rows * (head.num_classes or 0)


def head_size(config: ModelConfig) -> Size:
    """Return the size of a classifier's head, which each text passes once; nothing for a language model."""
    head, ffn = config.classifier, config.ffn
    if head is None:
        return Size()
    assert head.num_classes, "the size of a head depends on the number of classes"
    if not isinstance(head, ExpertHeadConfig):
        return matrix(head.num_classes, config.dim) + vector(head.num_classes)
    dims = (config.dim, *head.hidden_dims, head.num_classes)
    expert = total(matrix(there, here) + vector(there) for here, there in pairwise(dims))
    used = times(ffn.top_k, expert)
    return router_size(config.dim, ffn) + Size(ffn.num_experts * expert.stored, used.used, used.multiplied)


def flops(config: ModelConfig, layers: range, more: float, seq_len: int) -> float:
    """Return the operations per token of some layers and of what belongs to them.

    Args:
        config: the model.
        layers: their numbers.
        more: entries of further matrices, which every token is multiplied with: output heads, say. Those of which only
            some are in use on average may be a fraction.
        seq_len: positions per sequence.
    """
    products = sum(block_products(config, layer, seq_len) for layer in layers)
    # Those that a block takes see only each other.
    scores = sum(score_flops(config, layer, tokens_taken(config, layer, seq_len)) for layer in layers)
    return 2 * (products + more) + scores / seq_len
