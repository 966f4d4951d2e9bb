"""From what the experts made of a token to the one vector that the layer adds: messages, pooling, combiner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import ModelConfig
from moe_train.moe.graph.adjacency import Adjacency
from moe_train.moe.graph.conv import GraphConv, Messages
from moe_train.moe.modules import Linear, build_norm
from moe_train.moe.roles import Kind, Role


@dataclass(frozen=True)
class Coupled:
    """What the coupling made of the experts of each token.

    Attributes:
        y_TD: [T, D] one vector per token.
        messages: per graph layer what they told each other; empty where they exchange nothing.
    """

    y_TD: Tensor
    messages: tuple[Messages, ...]


class Pooling(nn.Module):
    """Softmax weights over the experts of a token: equal ones, or learned, alone or as a query on what they hold.

    Args:
        dim: width D.
        num_experts: experts E.
        kind: mean, weighted or attention.
        init_std: standard deviation of the initial query; learned weights start equal.
    """

    logits_E: nn.Parameter | None
    query_D: nn.Parameter | None

    def __init__(self, dim: int, num_experts: int, kind: str, init_std: float) -> None:
        super().__init__()
        self.register_parameter("logits_E", nn.Parameter(torch.empty(num_experts)) if kind == "weighted" else None)
        self.register_parameter("query_D", nn.Parameter(torch.empty(dim)) if kind == "attention" else None)
        self.roles = {"logits_E": Role(Kind.DENSE, 0.0), "query_D": Role(Kind.DENSE, init_std)}

    def forward(self, h_TED: Tensor) -> Tensor:
        """Return [T, D] from [T, E, D]."""
        if self.query_D is not None:
            scores_TE = h_TED @ self.query_D.to(h_TED.dtype) * h_TED.shape[-1] ** -0.5
        elif self.logits_E is not None:
            scores_TE = self.logits_E.expand(len(h_TED), -1)
        else:
            return h_TED.mean(dim=1)
        precise = torch.promote_types(h_TED.dtype, torch.float32)
        weights_TE = scores_TE.to(precise).softmax(dim=1).to(h_TED.dtype)
        return torch.einsum("te,ted->td", weights_TE, h_TED)


class Combiner(nn.Module):
    """What follows the pooling: a linear map, and after it GELU and a norm where the original has them.

    Args:
        config: the model.
        normed: whether GELU and norm follow.
        out_std: standard deviation of the initial values of the linear map.
    """

    def __init__(self, config: ModelConfig, normed: bool, out_std: float) -> None:
        super().__init__()
        self.map = Linear(config.dim, config.dim, config.init_std if normed else out_std, biased=True)
        self.norm = build_norm(config.norm, config.dim, config.norm_eps) if normed else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply to [T, D]."""
        y_TD: Tensor = self.map(x_TD)
        return y_TD if self.norm is None else self.norm(F.gelu(y_TD))


class Coupling(nn.Module):
    """Graph layers one after the other, then pooling and combiner; token by token, where the token is at home.

    Args:
        config: the model.
        out_std: standard deviation of the initial values of what writes into the residual stream.
    """

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        graph, dim, num_experts = config.ffn.graph, config.dim, config.ffn.num_experts
        assert graph is not None, "only a layer with a graph is coupled"
        self.convs = nn.ModuleList(GraphConv(dim, num_experts, graph, config.init_std) for _ in range(graph.layers))
        self.pooling = Pooling(dim, num_experts, graph.pooling, config.init_std)
        combined = graph.combiner != "none"
        self.combiner = Combiner(config, graph.combiner == "gelu_norm", out_std) if combined else None

    def forward(self, h_TED: Tensor) -> Coupled:
        """Couple the experts' results [T, E, D]."""
        messages: list[Messages] = []
        for conv in self.convs:
            h_TED, told = conv(h_TED)
            if told is not None:
                messages.append(told)
        y_TD = self.pooling(h_TED)
        if self.combiner is not None:
            y_TD = self.combiner(y_TD)
        return Coupled(y_TD, tuple(messages))

    def adjacencies(self) -> Tensor:
        """Return the weights [M, E, E] of the edges of each graph layer with messages, at least fp32."""
        graphs = (module for module in self.modules() if isinstance(module, Adjacency))
        found = [graph(next(self.parameters()).device, torch.float64) for graph in graphs]
        return torch.stack(found) if found else torch.zeros(0, 0, 0)
