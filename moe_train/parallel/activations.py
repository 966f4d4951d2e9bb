"""What a forward pass keeps for the backward pass, in closed form: from the configuration and the batch alone."""

from __future__ import annotations

import math

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.models.attention import head_width, window_of
from moe_train.models.build import is_moe_layer, shared_width
from moe_train.models.transformer import PRECISIONS
from moe_train.ops.attention_products import BLOCK
from moe_train.ops.expert_ffn.compute import BLOCK_ROWS
from moe_train.ops.expert_ffn.function import saved_bytes
from moe_train.parallel.remat import Remat

STATISTIC = 4
"""Bytes of a number that is at least fp32: a norm's reciprocal root, a router's logit or weight."""
INDEX = 8
"""Bytes of an int64."""


def activation_bytes(
    config: ModelConfig,
    vocab_size: int,
    tokens: int,
    seq_len: int,
    precision: str,
    remat: Remat = "none",
    by_products: bool = True,
) -> int:
    """Return the bytes of one micro-batch on one rank that holds all experts, when its backward pass begins.

    For decoders with RMSNorm, SwiGLU, grouped-query attention and dense or routed feed-forward layers without capacity
    limit, in fp32 or bf16, nothing compiled. Experts are taken to be loaded evenly. What a recomputation makes again
    comes on top, block by block, as does what products need while they run.

    Args:
        config: the model.
        vocab_size: rows of the embedding.
        tokens: T of the micro-batch.
        seq_len: positions S per sequence.
        precision: ``train.precision``.
        remat: ``parallel.remat``.
        by_products: whether attention keeps its scores (`moe_train.ops.attention_products`), or is fused.
    """
    size = PRECISIONS[precision].activations.itemsize
    residual = tokens * config.dim * size
    ends = residual + tokens * (STATISTIC + INDEX) + head_bytes(config, vocab_size, tokens, size)
    if remat == "full":
        return ends + config.layers * residual
    kept = ends
    for layer in range(config.layers):
        kept += 2 * residual  # what both norms read
        if remat == "none":
            kept += attention_bytes(config, layer, tokens, seq_len, size, by_products)
        kept += feed_forward_bytes(config, layer, tokens, size, remat)
    if remat == "none":
        kept += seq_len * rotary_columns(config) * STATISTIC
    return kept


def recomputed_bytes(
    config: ModelConfig, tokens: int, seq_len: int, precision: str, remat: Remat, by_products: bool = True
) -> int:
    """Return the bytes of what is made again at one time in the backward pass; takes what `activation_bytes` takes.

    That is the largest block in full, or the larger part of one, without what is kept of it anyway.
    """
    if remat == "none":
        return 0
    size = PRECISIONS[precision].activations.itemsize
    found = []
    for layer in range(config.layers):
        attention = attention_bytes(config, layer, tokens, seq_len, size, by_products)
        whole = feed_forward_bytes(config, layer, tokens, size, "none")
        kept = feed_forward_bytes(config, layer, tokens, size, "selective")
        parts = (attention, whole - kept)
        found.append(max(parts) if remat == "selective" else attention + whole + tokens * config.dim * size)
    return max(found)


def working_bytes(config: ModelConfig, tokens: int, seq_len: int, precision: str, by_products: bool = True) -> int:
    """Return the bytes that the backward pass of one part of a block needs for itself; the largest part's."""
    size, ffn = PRECISIONS[precision].activations.itemsize, config.ffn
    heads = config.heads * head_width(config, grouped(config))
    if by_products:  # scores of a block of queries and their gradient; gradients of queries, keys, values as sums
        attention = 2 * tokens * config.heads * min(BLOCK, seq_len) * size + 3 * tokens * heads * STATISTIC
    else:
        attention = 3 * tokens * heads * size
    found = [attention]
    for layer in range(config.layers):
        if is_moe_layer(ffn, layer):
            rows = rows_with_fill(ffn, tokens)
            # Hidden values, their gradients, and those of what comes home, block by block; of what came, all.
            block = min(rows, BLOCK_ROWS) * (3 * ffn.expert_dim + config.dim)
            found.append((block + rows * config.dim) * size)
        else:
            found.append(tokens * 3 * ffn.hidden_dim * size)
    return max(found)


def head_bytes(config: ModelConfig, vocab_size: int, tokens: int, size: int) -> int:
    """Return what the output head and the loss keep: logits, or in bf16 the gradients that are made at once."""
    head = tokens * config.dim * size
    if size < STATISTIC:
        return head + vocab_size * config.dim * STATISTIC
    return head + tokens * (vocab_size * size + INDEX)


def attention_bytes(config: ModelConfig, layer: int, tokens: int, seq_len: int, size: int, by_products: bool) -> int:
    """Return what norm and attention of a block keep beside the residual stream that they read."""
    attention = grouped(config)
    width = head_width(config, attention)
    heads = config.heads * width
    kept = tokens * (STATISTIC + config.dim * size)  # of the norm; what the projections read
    kept += tokens * 4 * heads * size  # queries, keys and values for all heads; what the output projection reads
    if by_products:
        scores = sum(rows * keys for rows, keys in blocks_in_sight(seq_len, window_of(attention, layer)))
        kept += tokens // seq_len * config.heads * scores * size
    else:
        kept += tokens * (heads * size + config.heads * STATISTIC)  # its result before it is transposed; softmax sums
    rows = heads + 2 * (attention.kv_heads or config.heads) * width
    return kept + cast_bytes((rows + heads) * config.dim, size)


def blocks_in_sight(seq_len: int, window: int | None) -> list[tuple[int, int]]:
    """Return rows and keys of each block of queries whose scores are kept."""
    found = []
    for first in range(0, seq_len, BLOCK):
        last = min(first + BLOCK, seq_len)
        found.append((last - first, last - (0 if window is None else max(0, first + 1 - window))))
    return found


def network_bytes(dim: int, hidden_dim: int, tokens: int, size: int) -> int:
    """Return what a SwiGLU network keeps beside its input: first product, its activation, what the second reads."""
    return tokens * 4 * hidden_dim * size + cast_bytes(3 * hidden_dim * dim, size)


def feed_forward_bytes(config: ModelConfig, layer: int, tokens: int, size: int, remat: Remat) -> int:
    """Return what the feed-forward half of a block keeps beside the residual stream that it reads."""
    if is_moe_layer(config.ffn, layer):
        return routed_bytes(config, tokens, size, remat)
    if remat != "none":
        return 0
    normed = tokens * (STATISTIC + config.dim * size)
    return normed + network_bytes(config.dim, config.ffn.hidden_dim, tokens, size)


def routed_bytes(config: ModelConfig, tokens: int, size: int, remat: Remat) -> int:
    """Return what norm, router and experts of a block keep beside the residual stream that they read."""
    ffn = config.ffn
    kept = tokens * (STATISTIC + config.dim * size)  # of the norm; what router and experts read
    kept += tokens * (ffn.num_experts * STATISTIC + STATISTIC + 2)  # probabilities, the z-loss
    kept += tokens * ffn.top_k * (INDEX + STATISTIC)  # choices and weights
    if remat != "none":
        return kept
    kept += tokens * (ffn.num_experts + ffn.top_k) * STATISTIC  # logits, weights before they are scaled
    if size < STATISTIC:
        kept += tokens * config.dim * STATISTIC  # the router's own copy
    rows = rows_with_fill(ffn, tokens)
    kept += saved_bytes(rows, tokens * ffn.top_k, tokens, 2 * ffn.expert_dim, size)
    shared = shared_width(ffn)
    return kept + (network_bytes(config.dim, shared, tokens, size) if shared else 0)


def rows_with_fill(ffn: FFNConfig, tokens: int) -> int:
    """Return the rows of all experts' segments, each filled up by half a step (`moe_train.ops.expert_ffn.segments`)."""
    each = tokens * ffn.top_k / ffn.num_experts
    step = max(16, 2 ** math.floor(math.log2(max(each, 1.0))) // 16)
    return int(ffn.num_experts * (each + step / 2))


def cast_bytes(values: int, size: int) -> int:
    """Return what the copy of weights takes that is made for one use."""
    return values * size if size < STATISTIC else 0


def rotary_columns(config: ModelConfig) -> int:
    """Return the numbers per position of the rotary table."""
    return head_width(config, grouped(config)) if config.positions == "rotary" else 0


def grouped(config: ModelConfig) -> GroupedQueryConfig:
    """Return the attention for which the closed form holds."""
    assert isinstance(config.attention, GroupedQueryConfig), "the closed form is that of grouped-query attention"
    return config.attention
