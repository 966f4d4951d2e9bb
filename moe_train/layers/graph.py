"""Experts that all see every token and exchange messages through a learned graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor, nn

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.graph_rules import GRAPH, edge_problems
from moe_train.config.model import Activation, FFNConfig, ModelConfig
from moe_train.errors import Problem
from moe_train.layers.arguments import check, divides, not_negative, one_of, positive
from moe_train.layers.base import INIT_STD, fill
from moe_train.models.build import build_graph
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.graph.conv import GraphConv
from moe_train.moe.graph.record import GraphRecord

HEAD_WIDTH = 64
"""Width of a head where the number of heads is not given, as in the GNN-MoE project."""


class Edges(TypedDict):
    """Which edges there are: arguments of both layers, keys of the trainer's graph."""

    self_edges: bool
    max_neighbors: int | None


class ExpertGraphConv(nn.Module):
    """One round of messages between the experts of a token (GNN-MoE, phase 1): h_i + GELU(N m_i + S h_i).

    Expert i receives m_i = Σ_j A_ij · a_ij · h_j. A is learned and the same for all tokens; the gate a_ij is a sigmoid
    of a linear map of both h_i and h_j. The residual is inside. Computed without a tensor over pairs of vectors.

    >>> import torch
    >>> from moe_train import ExpertGraphConv
    >>> conv = ExpertGraphConv(dim=16, num_experts=4)
    >>> held = torch.randn(2, 10, 4, 16)
    >>> conv(held).shape
    torch.Size([2, 10, 4, 16])
    >>> conv.adjacency.shape, conv.adjacency.diagonal().tolist()
    (torch.Size([4, 4]), [0.0, 0.0, 0.0, 0.0])

    Args:
        dim: width D of what an expert holds.
        num_experts: experts E.
        adjacency: A from its logits: sigmoid (each edge for itself), softmax (the sources of an expert in competition)
            or none (no logits: 1 everywhere).
        similarity: a_ij: gate, cosine of h_i and h_j, or dot, sigmoid(h_i·h_j / sqrt(D)).
        normalize: A_ij is divided by nothing (none), by the number of sources (count) or by Σ_j A_ij (degree).
        prenorm: whether h / rms(h) is read instead of h; the residual is h itself.
        self_edges: whether an expert sends messages to itself, too.
        max_neighbors: sources per expert, those with the largest logits; None: all; 0: no messages.

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        adjacency: str = "sigmoid",
        similarity: str = "gate",
        normalize: str = "none",
        *,
        prenorm: bool = False,
        self_edges: bool = False,
        max_neighbors: int | None = None,
    ) -> None:
        graph = {"adjacency": adjacency, "similarity": similarity, "normalize": normalize}
        edges = Edges(self_edges=self_edges, max_neighbors=max_neighbors)
        check(positive(dim=dim, num_experts=num_experts), words(**graph), edge_refusals(num_experts, adjacency, edges))
        super().__init__()
        self.num_experts = num_experts
        config = GraphConfig.model_validate({**graph, **edges, "prenorm": prenorm})
        self.conv = GraphConv(dim, num_experts, config, INIT_STD)
        fill(self)

    def forward(self, h_BSED: Tensor) -> Tensor:
        """Return what the experts then hold, [B, S, E, D] as before, of any floating dtype."""
        coupled_TED: Tensor = self.conv(h_BSED.flatten(0, 1))[0]
        return coupled_TED.view_as(h_BSED)

    @property
    def adjacency(self) -> Tensor:
        """Weights A [E, E] of the messages to expert i (row) from expert j (column), with their gradient."""
        device = self.conv.own.weight.device
        if self.conv.messages is None:
            return torch.zeros(self.num_experts, self.num_experts, device=device)
        weights_EE: Tensor = self.conv.messages.adjacency(device, torch.float32)
        return weights_EE


class GraphCoupledMoE(nn.Module):
    """Experts that all see every token, exchange messages and become one vector (GNN-MoE, phase 1).

    Nothing is sparse: E experts cost E times what one does. After gnn_layers rounds of `ExpertGraphConv` the experts
    are pooled; a linear map, GELU and LayerNorm follow. There is no residual around it. Networks have biases.

    The defaults are the original's: with expert="block" the layer has the parameters of one of its layers, to the unit.
    Attention in a block is causal and knows no positions: add them to the input. An aux_loss is returned for
    orthogonality_loss_coef only: the weighted mean squared cosine between what two experts add to a token.

    >>> import torch
    >>> from moe_train import GraphCoupledMoE
    >>> moe = GraphCoupledMoE(dim=16, num_experts=4)
    >>> hidden_states = torch.randn(2, 10, 16)
    >>> output, aux_loss = moe(hidden_states)
    >>> output.shape, aux_loss.item()
    (torch.Size([2, 10, 16]), 0.0)
    >>> with torch.device("meta"):  # shapes only
    ...     blocks = GraphCoupledMoE(dim=256, expert="block")
    >>> sum(parameter.numel() for parameter in blocks.parameters())
    3489570

    Args:
        dim: width D of a token.
        num_experts: experts E.
        expert_dim: hidden width of an expert's feed-forward network; None: 4 · dim.
        expert: ffn (a feed-forward network) or block (a transformer block with attention, norms and residuals).
        num_heads: heads of a block; None: 64 wide ones, at least one.
        gnn_layers: rounds of messages.
        adjacency: see `ExpertGraphConv`, as for the next five.
        similarity: gate, cosine or dot.
        normalize: none, count or degree.
        prenorm: whether rounds of messages read h / rms(h).
        self_edges: whether an expert sends messages to itself, too.
        max_neighbors: sources per expert; None: all.
        pooling: mean, attention (a learned query on what the experts hold) or weighted (learned, for all tokens alike).
        combiner: none, linear, or gelu_norm.
        activation: of the experts' networks.
        orthogonality_loss_coef: weight of aux_loss, already applied.

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 4,
        expert_dim: int | None = None,
        expert: str = "ffn",
        num_heads: int | None = None,
        gnn_layers: int = 2,
        *,
        adjacency: str = "sigmoid",
        similarity: str = "gate",
        normalize: str = "none",
        prenorm: bool = False,
        self_edges: bool = False,
        max_neighbors: int | None = None,
        pooling: str = "mean",
        combiner: str = "gelu_norm",
        activation: str = "gelu",
        orthogonality_loss_coef: float = 0.0,
    ) -> None:
        hidden_dim = 4 * dim if expert_dim is None else expert_dim
        heads = max(1, dim // HEAD_WIDTH) if num_heads is None else num_heads
        kinds = {"expert": expert, "adjacency": adjacency, "similarity": similarity, "normalize": normalize}
        kinds |= {"pooling": pooling, "combiner": combiner}
        edges = Edges(self_edges=self_edges, max_neighbors=max_neighbors)
        check(
            positive(dim=dim, num_experts=num_experts, expert_dim=hidden_dim),
            not_negative(gnn_layers=gnn_layers, orthogonality_loss_coef=orthogonality_loss_coef),
            words(**kinds),
            one_of(get_args(Activation), activation=activation),
            edge_refusals(num_experts, adjacency, edges),
            head_refusals(dim, expert, num_heads, heads),
        )
        super().__init__()
        graph = {**kinds, **edges, "prenorm": prenorm, "layers": gnn_layers, "orthogonality": orthogonality_loss_coef}
        ffn = {"num_experts": num_experts, "expert_dim": hidden_dim, "expert_activation": activation, "graph": graph}
        config = layer_model(dim, heads, ffn | {"expert_bias": True})
        assert config.ffn.graph is not None, "stated above"
        self.moe = build_graph(config, config.ffn.graph, 0, LocalExchange(num_experts), INIT_STD)
        fill(self)

    def forward(self, hidden_states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states_BSD: [B, S, D] tokens of any floating dtype.

        Returns:
            The output [B, S, D] and the scalar loss, in at least fp32; zero in evaluation.
        """
        output = self.moe(hidden_states_BSD)
        assert isinstance(output.record, GraphRecord), "what a graph layer leaves"
        precise = torch.promote_types(hidden_states_BSD.dtype, torch.float32)
        if not self.training or self.moe.balance.coef == 0.0:
            return output.y_BSD, torch.zeros((), dtype=precise, device=hidden_states_BSD.device)
        num_tokens = max(1, hidden_states_BSD[..., 0].numel())
        return output.y_BSD, (self.moe.balance.share(output.record, ()) / num_tokens).to(precise)


def layer_model(dim: int, heads: int, ffn: dict[str, Any]) -> ModelConfig:
    """Return the trainer's configuration around a layer: norms and attention of the original."""
    attention = GroupedQueryConfig(qkv_bias=True, out_bias=True)
    return ModelConfig(dim=dim, heads=heads, norm="layer", attention=attention, ffn=FFNConfig.model_validate(ffn))


def words(**values: str) -> list[Problem]:
    """Refuse what a key of the trainer's graph does not know, each under the name of the key."""
    allowed = {name: get_args(GraphConfig.model_fields[name].annotation) for name in values}
    return [problem for name, value in values.items() for problem in one_of(allowed[name], **{name: value})]


def edge_refusals(num_experts: int, adjacency: str, edges: Edges) -> list[Problem]:
    """Refuse edges that cannot be, by the trainer's rules in the names of the arguments."""
    wanted = edges["max_neighbors"]
    if wanted is None or num_experts < 1:
        return []
    if wanted < 0:
        return not_negative(max_neighbors=wanted)
    known = words(adjacency=adjacency) == []
    graph = GraphConfig.model_validate({**edges, "adjacency": adjacency if known else "sigmoid"})
    prefix = f"{GRAPH}."
    return [
        replace(problem, key=problem.key.removeprefix(prefix), remedy=problem.remedy.replace(prefix, ""))
        for problem in edge_problems(num_experts, graph)
    ]


def head_refusals(dim: int, expert: str, stated: int | None, heads: int) -> list[Problem]:
    """Refuse heads that no block can have, or that no block is there for.

    Args:
        dim: width D.
        expert: ffn or block.
        stated: what the caller said.
        heads: what follows from it.
    """
    if expert != "block":
        rule = "only blocks have attention"
        return [] if stated is None else [Problem("num_heads", stated, rule, "leave it out, or set expert='block'")]
    return [*positive(num_heads=heads), *divides("dim", dim, num_heads=heads)]
