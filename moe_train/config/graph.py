"""The keys of dense graph-coupled layers: every expert sees every token, and the experts exchange messages."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from moe_train.config.base import Strict


class GraphConfig(Strict):
    """How the experts of a layer are coupled (after the GNN-MoE project, phase 1).

    Expert i receives m_i = Σ_j A_ij · a_ij · h_j from its sources j: A is learned and the same for all tokens, a
    depends on what the two experts hold. A graph layer is h_i + GELU(N m_i + S h_i).
    """

    expert: Literal["ffn", "block"] = "ffn"
    """ffn: an expert is a feed-forward network inside a normal block; block: a whole transformer block, attention
    included."""
    layers: NonNegativeInt = 2
    """Graph layers after the experts; 0: the experts are only pooled."""
    adjacency: Literal["sigmoid", "softmax", "none"] = "sigmoid"
    """A from its logits: each edge for itself, the sources of an expert in competition, or no logits: 1 everywhere."""
    adjacency_mean: float = 0.0
    """Mean of the initial logits."""
    adjacency_std: NonNegativeFloat = 1.0
    """Standard deviation of the initial logits."""
    self_edges: bool = False
    """Whether an expert sends messages to itself, too."""
    normalize: Literal["none", "count", "degree"] = "none"
    """What A_ij is divided by: nothing (messages grow with the number of experts), the number of i's sources, or
    Σ_j A_ij over them."""
    prenorm: bool = False
    """Whether a graph layer reads h / rms(h) instead of h, whose size the experts would have to learn first."""
    similarity: Literal["gate", "cosine", "dot"] = "gate"
    """a_ij: sigmoid(u·h_i + v·h_j + c), the cosine of h_i and h_j, or sigmoid(h_i·h_j / sqrt(D))."""
    max_neighbors: NonNegativeInt | None = None
    """Sources per expert: those with the largest logits; null: all experts; 0: no messages."""
    pooling: Literal["mean", "attention", "weighted"] = "mean"
    """How the experts become one vector: their mean, or softmax weights: of a learned query on what they hold
    (attention), or learned and the same for all tokens (weighted)."""
    combiner: Literal["none", "linear", "gelu_norm"] = "none"
    """What follows the pooling: nothing, a linear map, or a linear map, GELU and a norm (as the original)."""
    orthogonality: NonNegativeFloat = 0.0
    """Weight of the mean squared cosine between what two experts add to a token, relative to the cross-entropy."""
    chunk_tokens: PositiveInt | None = None
    """Tokens per rank that pass through experts and graph at a time (at least one sequence, where an expert is a
    block); null: all."""
    recompute: bool = False
    """Whether the backward pass computes experts and graph again, chunk by chunk, instead of keeping their E-fold
    activations. It also sends the tokens again."""
