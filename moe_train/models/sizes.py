"""Sizes of the parts of a model in closed form: what each stores, uses and multiplies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from moe_train.config.attention import GroupedQueryConfig, LatentConfig, SwitchHeadConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.model import Activation, FFNConfig, ModelConfig
from moe_train.config.routing import (
    HashRouterConfig,
    HierarchicalRouterConfig,
    NoisyTopKRouterConfig,
    TopKSoftmaxRouterConfig,
)
from moe_train.models.attention import head_width, window_of
from moe_train.models.build import is_moe_layer
from moe_train.models.depth import depth_of, num_taken
from moe_train.ops.activation import inner_width


@dataclass(frozen=True)
class Size:
    """What a part of a model costs.

    Attributes:
        stored: parameters, all experts included.
        used: parameters that one token uses: K of the E experts.
        multiplied: those of the used ones that stand in matrices, each a multiplication and an addition per token.
    """

    stored: int = 0
    used: int = 0
    multiplied: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.stored + other.stored, self.used + other.used, self.multiplied + other.multiplied)


def total(sizes: Iterable[Size]) -> Size:
    """Return the sum of parts."""
    return sum(sizes, Size())


def matrix(rows: int, columns: int) -> Size:
    """Return the size of a matrix that every token is multiplied with."""
    return Size(rows * columns, rows * columns, rows * columns)


def vector(width: int) -> Size:
    """Return the size of a bias or gain that every token uses; its operations do not count."""
    return Size(width, width)


def grouped_query_size(config: ModelConfig, attention: GroupedQueryConfig) -> Size:
    """Return the size of grouped-query attention."""
    width = head_width(config, attention)
    queries, keys = config.heads * width, (attention.kv_heads or config.heads) * width
    size = matrix(queries + 2 * keys, config.dim) + matrix(config.dim, queries)
    if attention.qkv_bias:
        size += vector(queries + 2 * keys)
    if attention.out_bias:
        size += vector(config.dim)
    if attention.sinks:
        size += vector(config.heads)
    return size + vector({"none": 0, "head": 2 * width, "full": queries + keys}[attention.qk_norm])


def latent_size(config: ModelConfig, attention: LatentConfig) -> Size:
    """Return the size of multi-head latent attention (DeepSeek-V2, 2.1 and appendix C)."""
    queries = config.heads * (attention.nope_dim + attention.rope_dim)
    keys_values = config.heads * (attention.nope_dim + attention.v_dim)
    size = matrix(attention.kv_rank + attention.rope_dim, config.dim) + vector(attention.kv_rank)
    size += matrix(keys_values, attention.kv_rank) + matrix(config.dim, config.heads * attention.v_dim)
    if attention.q_rank is None:
        return size + matrix(queries, config.dim)
    return size + matrix(attention.q_rank, config.dim) + vector(attention.q_rank) + matrix(queries, attention.q_rank)


def attention_size(config: ModelConfig) -> Size:
    """Return the size of the attention of one block."""
    match config.attention:
        case LatentConfig() as attention:
            return latent_size(config, attention)
        case SwitchHeadConfig() as attention:
            return switchhead_size(config, attention)
        case GroupedQueryConfig() as attention:
            return grouped_query_size(config, attention)
        case _:
            assert_never(config.attention)


def switchhead_size(config: ModelConfig, attention: SwitchHeadConfig) -> Size:
    """Return the size of SwitchHead: dense queries and keys, experts and routers on both sides of each head.

    Stored are 2·D·H·W + 2·H·E·D·W + 2·H·E·D; used are K of the E experts.
    """
    width = head_width(config, attention)
    side = matrix(width, config.dim) + matrix(attention.experts, config.dim)
    return times(2 * config.heads, side) + head_experts_size(config, attention)


def head_experts_size(config: ModelConfig, attention: SwitchHeadConfig) -> Size:
    """Return the size of the experts of all heads on both sides."""
    expert, sides = matrix(head_width(config, attention), config.dim), 2 * config.heads
    used = sides * attention.top_k
    return Size(sides * attention.experts * expert.stored, used * expert.used, used * expert.multiplied)


def network_size(dim: int, hidden_dim: int, activation: Activation, biased: bool = False) -> Size:
    """Return the size of a feed-forward network; one with a gate has three projections, else two."""
    inner = inner_width(activation, hidden_dim)
    size = matrix(inner, dim) + matrix(dim, hidden_dim)
    return size + vector(inner + dim) if biased else size


def router_size(dim: int, ffn: FFNConfig) -> Size:
    """Return the size of a router. The bias of loss-free balancing is a buffer: it is moved, not trained."""
    choices = ffn.num_experts + ffn.num_noop_experts
    match ffn.router:
        case HashRouterConfig():
            return Size()
        case NoisyTopKRouterConfig():
            return matrix(2 * choices, dim)
        case HierarchicalRouterConfig(groups=groups):
            return matrix(choices + groups, dim)
        case TopKSoftmaxRouterConfig(gate_dim=int(hidden)):
            return matrix(hidden, dim) + vector(hidden) + matrix(choices, hidden) + vector(choices)
        case TopKSoftmaxRouterConfig(bias=True):
            return matrix(choices, dim) + vector(choices)
        case _:
            return matrix(choices, dim)


def moe_size(dim: int, ffn: FFNConfig) -> Size:
    """Return the size of a MoE layer: router, routed and shared experts.

    With Z no-op experts a token uses K·E/(E + Z) experts: an expectation, which holds as far as the load is even.
    """
    expert = network_size(dim, ffn.expert_dim, ffn.expert_activation or ffn.activation, ffn.expert_bias)
    taken, choices = ffn.top_k * ffn.num_experts, ffn.num_experts + ffn.num_noop_experts
    used, multiplied = (taken * size // choices for size in (expert.used, expert.multiplied))
    routed = Size(ffn.num_experts * expert.stored, used, multiplied)
    size = router_size(dim, ffn) + routed
    if ffn.num_shared_experts:
        size += network_size(dim, ffn.num_shared_experts * (ffn.shared_dim or ffn.expert_dim), ffn.activation)
        size += matrix(1, dim) if ffn.shared_gate else Size()
    return size


def block_size(config: ModelConfig, layer: int) -> Size:
    """Return the size of a block; where only some tokens pass it, of one that does, and with what chooses them."""
    return whole_block_size(config, layer) + depth_router_size(config, layer)


def depth_router_size(config: ModelConfig, layer: int) -> Size:
    """Return the size of what chooses the tokens of a block, which all tokens meet; nothing, where it takes all."""
    depth = depth_of(config, layer)
    if depth is None:
        return Size()
    size, hidden = matrix(1, config.dim), depth.predictor_dim
    if depth.causal == "classifier":
        return size
    return size + matrix(hidden, config.dim) + vector(hidden) + matrix(1, hidden) + vector(1)


def whole_block_size(config: ModelConfig, layer: int) -> Size:
    """Return the size of a block without the choice of its tokens: two norms, attention, and what the pattern says."""
    ffn = config.ffn
    around = norm_size(config) + norm_size(config) + attention_size(config)
    if not is_moe_layer(ffn, layer):
        return around + network_size(config.dim, ffn.hidden_dim, ffn.activation)
    if ffn.graph is None:
        return around + moe_size(config.dim, ffn)
    expert = network_size(config.dim, ffn.expert_dim, ffn.expert_activation or ffn.activation, ffn.expert_bias)
    if ffn.graph.expert == "block":
        return times(ffn.num_experts, around + expert) + coupling_size(config, ffn.graph)
    return around + times(ffn.num_experts, expert) + coupling_size(config, ffn.graph)


def tokens_taken(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Return how many tokens of a sequence pass a block."""
    depth = depth_of(config, layer)
    return seq_len if depth is None else num_taken(depth, seq_len)


def block_products(config: ModelConfig, layer: int, seq_len: int) -> float:
    """Return the multiplications of parameters in a block per token, the mean over a sequence."""
    taken, whole = tokens_taken(config, layer, seq_len), whole_block_size(config, layer).multiplied
    share = whole if taken == seq_len else whole * taken / seq_len
    return share + depth_router_size(config, layer).multiplied


def norm_size(config: ModelConfig) -> Size:
    """Return the size of a norm of the residual stream: its gain, and in LayerNorm a bias."""
    return vector(config.dim if config.norm == "rms" else 2 * config.dim)


def coupling_size(config: ModelConfig, graph: GraphConfig) -> Size:
    """Return the size of graph layers, pooling and combiner of one layer with experts.

    The linear maps of a graph layer are stored once and applied to the E vectors of a token.
    """
    dim, num_experts = config.dim, config.ffn.num_experts
    linear = matrix(dim, dim) + vector(dim)
    layer = per_expert(num_experts, linear)
    if graph.max_neighbors != 0:
        layer += per_expert(num_experts, linear) + Size(multiplied=message_products(config, graph))
        if graph.similarity == "gate":
            layer += per_expert(num_experts, matrix(1, 2 * dim) + vector(1))
        if graph.adjacency != "none":
            layer += vector(num_experts**2)
    size = times(graph.layers, layer)
    size += pooling_size(dim, num_experts, graph)
    if graph.combiner != "none":
        size += linear
    return size + norm_size(config) if graph.combiner == "gelu_norm" else size


def pooling_size(dim: int, num_experts: int, graph: GraphConfig) -> Size:
    """Return the size of the pooling: its weights multiply what the experts hold, and so does the query of attention.

    A mean only adds.
    """
    match graph.pooling:
        case "mean":
            return Size()
        case "weighted":
            return vector(num_experts) + Size(multiplied=num_experts * dim)
        case "attention":
            return per_expert(num_experts, matrix(1, dim)) + Size(multiplied=num_experts * dim)


def message_products(config: ModelConfig, graph: GraphConfig) -> int:
    """Return the multiplications per token and graph layer that belong to no parameter.

    They are those of the sums of messages, E · M · D for M sources of each expert, and of the products of the vectors
    of all pairs, where these are compared.
    """
    num_experts = config.ffn.num_experts
    possible = num_experts if graph.self_edges else num_experts - 1
    sources = possible if graph.max_neighbors is None else min(possible, graph.max_neighbors)
    compared = 0 if graph.similarity == "gate" else possible
    return num_experts * (sources + compared) * config.dim


def times(number: int, part: Size) -> Size:
    """Return the size of several equal parts that every token passes through."""
    return Size(number * part.stored, number * part.used, number * part.multiplied)


def per_expert(num_experts: int, part: Size) -> Size:
    """Return the size of a part that is stored once and applied to what each expert holds."""
    return Size(part.stored, part.used, num_experts * part.multiplied)


def mtp_size(config: ModelConfig) -> Size:
    """Return the size of all modules that predict further tokens (DeepSeek-V3, 2.2).

    Each has two norms, a projection from 2·D to D, a block and a last norm; embedding and head are the model's.
    """
    module = times(3, norm_size(config)) + matrix(config.dim, 2 * config.dim)
    return total(module + block_size(config, config.layers + k) for k in range(config.mtp.depth))


def seen_positions(seq_len: int, window: int | None) -> int:
    """Return how many positions all tokens of a sequence see together, themselves included: causal, in a window."""
    reach = min(window or seq_len, seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach


def score_flops(config: ModelConfig, layer: int, seq_len: int) -> int:
    """Return the operations of a sequence in the products of queries, keys and values of one layer.

    Experts that are whole blocks have an attention each. What a token does not see is not counted, whether or not it is
    computed.
    """
    attention = config.attention
    if isinstance(attention, LatentConfig):
        widths, window = attention.nope_dim + attention.rope_dim + attention.v_dim, None
    elif isinstance(attention, SwitchHeadConfig):
        widths, window = 2 * head_width(config, attention), None
    else:
        widths, window = 2 * head_width(config, attention), window_of(attention, layer)
    graph = config.ffn.graph
    sees_all = isinstance(attention, GroupedQueryConfig) and not attention.causal
    seen = seq_len**2 if sees_all else seen_positions(seq_len, window)
    blocks = config.ffn.num_experts if graph and graph.expert == "block" and is_moe_layer(config.ffn, layer) else 1
    return blocks * 2 * config.heads * widths * seen
