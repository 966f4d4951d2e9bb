"""Which expert listens to which, and how much: the part of a message's strength that no token changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.config.graph import GraphConfig
from moe_train.moe.roles import Kind, Role
from moe_train.ops.topk import top_k

LEAST_DEGREE = 1e-12
"""Degrees below it do not divide: an expert whose edges have all but gone receives nothing, not noise."""


class Adjacency(nn.Module):
    """A learned directed graph: row i holds the weights A_ij of the messages that expert i receives from each j.

    Args:
        num_experts: experts E.
        config: how logits become weights, which edges there are, what the weights are divided by.
    """

    logits_EE: nn.Parameter | None

    def __init__(self, num_experts: int, config: GraphConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        learned = config.adjacency != "none"
        logits_EE = nn.Parameter(torch.empty(num_experts, num_experts)) if learned else None
        self.register_parameter("logits_EE", logits_EE)
        # Decay would pull every edge to 1/2 (sigmoid): no edge is the natural rest, not half of one.
        self.roles = {"logits_EE": Role(Kind.DENSE, config.adjacency_std, mean=config.adjacency_mean, decays=False)}

    @property
    def num_sources(self) -> int:
        """Number M of experts that each expert listens to."""
        possible = self.num_experts - int(not self.config.self_edges)
        return possible if self.config.max_neighbors is None else min(possible, self.config.max_neighbors)

    @property
    def is_complete(self) -> bool:
        """Whether no possible edge is left out."""
        return self.num_sources >= self.num_experts - int(not self.config.self_edges)

    def possible(self, device: torch.device) -> Tensor:
        """Return [E, E] bool: the edges that the configuration allows."""
        everyone_EE = torch.ones(self.num_experts, self.num_experts, dtype=torch.bool, device=device)
        return everyone_EE if self.config.self_edges else everyone_EE.fill_diagonal_(False)

    def sources(self) -> Tensor:
        """Return [E, M] int64: whom each expert listens to, strongest first where logits say so."""
        assert self.logits_EE is not None, "without logits no edge is stronger than another"
        ranked_EE = self.logits_EE.detach().masked_fill(~self.possible(self.logits_EE.device), float("-inf"))
        return top_k(ranked_EE, self.num_sources)

    def edges(self, device: torch.device) -> Tensor:
        """Return [E, E] bool: the edges there are."""
        possible_EE = self.possible(device)
        if self.is_complete:
            return possible_EE
        # Where too many logits are -inf, what is impossible ranks as high as what is left: it stays impossible.
        return torch.zeros_like(possible_EE).scatter_(1, self.sources(), True) & possible_EE

    def forward(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [E, E]; zero where there is no edge.

        Args:
            device: of the weights.
            dtype: of the weights, at least fp32, where there are no logits to take it from.
        """
        edges_EE = self.edges(device)
        if self.logits_EE is None:
            weights_EE = edges_EE.to(dtype)
        elif self.config.adjacency == "sigmoid":
            weights_EE = self.logits_EE.sigmoid().masked_fill(~edges_EE, 0.0)
        else:
            weights_EE = softmax_of_edges(self.logits_EE, edges_EE)
        return self.divided(weights_EE)

    def divided(self, weights_EE: Tensor) -> Tensor:
        """Return the weights [E, E] divided by what the configuration says."""
        match self.config.normalize:
            case "none":
                return weights_EE
            case "count":
                return weights_EE / max(1, self.num_sources)  # an expert alone has none
            case "degree":
                return weights_EE / weights_EE.sum(dim=1, keepdim=True).clamp(min=LEAST_DEGREE)


def softmax_of_edges(logits_EE: Tensor, edges_EE: Tensor) -> Tensor:
    """Return the softmax [E, E] over the edges of each row; a row whose logits are all -inf is zero, not nan."""
    shut = float("-inf")
    masked_EE = logits_EE.masked_fill(~edges_EE, shut)
    silent_E1 = (masked_EE == shut).all(dim=1, keepdim=True)
    return masked_EE.masked_fill(silent_E1, 0.0).softmax(dim=1).masked_fill(silent_E1, 0.0)
