"""One round of messages between the experts of a token, over a learned directed graph.

Source: the GNN-MoE project, phase 1 (its ExpertGraphConv): sigmoid adjacency, gate on the pair, sums of messages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.moe.graph.adjacency import Adjacency
from moe_train.moe.graph.similarity import build_similarity
from moe_train.moe.modules import Linear
from moe_train.ops.messages import sum_chosen_messages, sum_messages

EPS = 1e-6
"""Added to the mean square that normalises what experts hold: small, because they start with little."""
GATHER_UP_TO = 1
"""Most sources per expert for which gathering them is faster than one product with all experts: docs/benchmarks.md."""


@dataclass(frozen=True)
class Messages:
    """What the experts of each token told each other.

    Attributes:
        sent_TED: [T, E, D] h_j: what the experts hold, normalised where the graph is configured so.
        received_TED: [T, E, D] m_i = Σ_j strength_ij · h_j.
        strength_TEE: [T, E, E] weight A_ij · a_ij of the message to expert i (row) from expert j (column).
    """

    sent_TED: Tensor
    received_TED: Tensor
    strength_TEE: Tensor


class MessagePassing(nn.Module):
    """m_i = Σ_j A_ij · a_ij · h_j: A is learned and the same for all tokens, a depends on h_i and h_j.

    Args:
        dim: width D of what an expert holds.
        num_experts: experts E.
        config: of the graph.
        init_std: standard deviation of the initial values of the linear maps.
    """

    def __init__(self, dim: int, num_experts: int, config: GraphConfig, init_std: float) -> None:
        super().__init__()
        self.adjacency = Adjacency(num_experts, config)
        self.similarity = build_similarity(dim, config, init_std)
        self.map = Linear(dim, dim, init_std, biased=True)

    def forward(self, h_TED: Tensor) -> Messages:
        """Return the messages between experts that send [T, E, D]."""
        precise = torch.promote_types(h_TED.dtype, torch.float32)
        strength_TEE = self.adjacency(h_TED.device, precise) * self.similarity(h_TED)
        if not self.adjacency.is_complete and self.adjacency.num_sources <= GATHER_UP_TO:
            received_TED = sum_chosen_messages(strength_TEE, h_TED, self.adjacency.sources())
        else:
            received_TED = sum_messages(strength_TEE, h_TED)
        return Messages(h_TED, received_TED, strength_TEE)


class GraphConv(nn.Module):
    """h_i + GELU(N m_i + S h_i), where m_i are the messages that expert i receives.

    Args:
        dim: width D of what an expert holds.
        num_experts: experts E.
        config: of the graph; with max_neighbors = 0 there are no messages and no N.
        init_std: standard deviation of the initial values of the linear maps.
    """

    def __init__(self, dim: int, num_experts: int, config: GraphConfig, init_std: float) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.own = Linear(dim, dim, init_std, biased=True)
        silent = config.max_neighbors == 0
        self.messages = None if silent else MessagePassing(dim, num_experts, config, init_std)

    def forward(self, h_TED: Tensor) -> tuple[Tensor, Messages | None]:
        """Return what the experts of each token then hold [T, E, D], and what they told each other."""
        read_TED = self.read(h_TED)
        if self.messages is None:
            return h_TED + F.gelu(self.own(read_TED)), None
        messages: Messages = self.messages(read_TED)
        return h_TED + F.gelu(self.messages.map(messages.received_TED) + self.own(read_TED)), messages

    def read(self, h_TED: Tensor) -> Tensor:
        """Return what the layer looks at [T, E, D]: what the experts hold, or the same of root mean square 1."""
        if not self.prenorm:
            return h_TED
        precise = torch.promote_types(h_TED.dtype, torch.float32)
        return F.rms_norm(h_TED.to(precise), h_TED.shape[-1:], eps=EPS).to(h_TED.dtype)
