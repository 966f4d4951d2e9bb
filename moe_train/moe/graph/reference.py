"""The messages as their formulas say, token by token and pair by pair: slow, obvious, what the fast path must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.moe.graph.conv import EPS, GraphConv, MessagePassing
from moe_train.moe.graph.similarity import PairGate, ScaledDot


def conv_one_by_one(conv: GraphConv, h_TED: Tensor) -> Tensor:
    """Return what `GraphConv.forward` leaves in the experts [T, E, D], by loops over tokens and pairs of experts."""
    tokens = []
    for h_ED in h_TED.unbind():
        read_ED = torch.stack([read_one(conv, h_D) for h_D in h_ED.unbind()])
        rows = []
        for i, h_D in enumerate(h_ED.unbind()):
            inner_D = conv.own(read_ED[i])
            if conv.messages is not None:
                inner_D = inner_D + conv.messages.map(received_one_by_one(conv.messages, read_ED, i))
            rows.append(h_D + F.gelu(inner_D))
        tokens.append(torch.stack(rows))
    return torch.stack(tokens)


def read_one(conv: GraphConv, h_D: Tensor) -> Tensor:
    """Return what the layer looks at of one expert [D]."""
    return h_D / (h_D.square().mean() + EPS).sqrt() if conv.prenorm else h_D


def received_one_by_one(messages: MessagePassing, h_ED: Tensor, i: int) -> Tensor:
    """Return what expert i receives about one token [D]."""
    m_D = torch.zeros_like(h_ED[i])
    for j in sources_of(messages, i):
        m_D = m_D + weight_of_edge(messages, i, j) * similarity_of_pair(messages, h_ED[i], h_ED[j]) * h_ED[j]
    return m_D


def sources_of(messages: MessagePassing, i: int) -> list[int]:
    """Return whom expert i listens to; among equally strong sources the lowest index comes first."""
    config, logits_EE = messages.adjacency.config, messages.adjacency.logits_EE
    sources = [j for j in range(messages.adjacency.num_experts) if j != i or config.self_edges]
    if config.max_neighbors is not None and logits_EE is not None:
        sources.sort(key=lambda j: -logits_EE[i, j].item())
        sources = sources[: config.max_neighbors]
    return sources


def weight_of_edge(messages: MessagePassing, i: int, j: int) -> Tensor | float:
    """Return A_ij of a source j, divided as configured; a number where nothing is learned."""
    config, logits_EE = messages.adjacency.config, messages.adjacency.logits_EE
    sources = sources_of(messages, i)
    weights: dict[int, Tensor | float]
    if logits_EE is None:
        weights = dict.fromkeys(sources, 1.0)
    elif config.adjacency == "sigmoid":
        weights = {k: 1 / (1 + (-logits_EE[i, k]).exp()) for k in sources}
    else:
        total = sum(logits_EE[i, k].exp() for k in sources)
        weights = {k: logits_EE[i, k].exp() / total for k in sources}
    if config.normalize == "count":
        return weights[j] / len(sources)
    if config.normalize == "degree":
        return weights[j] / sum(weights.values())
    return weights[j]


def similarity_of_pair(messages: MessagePassing, receiver_D: Tensor, sender_D: Tensor) -> Tensor:
    """Return a_ij; the gate as the linear map on the pair that it is."""
    similarity = messages.similarity
    if isinstance(similarity, PairGate):
        gate_1: Tensor = similarity.pair(torch.cat([receiver_D, sender_D]))
        return torch.sigmoid(gate_1).squeeze(0)
    if isinstance(similarity, ScaledDot):
        return torch.sigmoid(receiver_D.dot(sender_D) / math.sqrt(len(sender_D)))
    cosine: Tensor = torch.dot(receiver_D, sender_D) / (receiver_D.norm() * sender_D.norm())
    return cosine
