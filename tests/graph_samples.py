"""Small graph-coupled layers whose every parameter is random, and their formulas as loops over numbers of one token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.config.graph_rules import edge_problems
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.moe.graph.conv import GraphConv, MessagePassing
from moe_train.moe.graph.coupling import Coupling

Module = TypeVar("Module", bound=nn.Module)
ADJACENCIES, SIMILARITIES, NORMALIZES = ("sigmoid", "softmax", "none"), ("gate", "cosine", "dot"), (
    "none", "count", "degree",
)  # fmt: skip
POOLINGS, COMBINERS = ("mean", "attention", "weighted"), ("none", "linear", "gelu_norm")
DIM = 3


def random(*shape: int, seed: int = 9) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: Module, seed: int = 0) -> Module:
    """The module with normal numbers for parameters, none of them like another."""
    for place, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=100 * seed + place)
    return module


def is_possible(num_experts: int, graph: GraphConfig) -> bool:
    """Whether the rules of the configuration let experts have this graph."""
    return not list(edge_problems(num_experts, graph))


def graphs(num_experts: int, **fixed: Any) -> Iterable[GraphConfig]:
    """All graphs that differ in what decides the edges, and that the rules allow."""
    free = {
        "adjacency": ADJACENCIES, "similarity": SIMILARITIES, "normalize": NORMALIZES,
        "self_edges": (False, True), "max_neighbors": (None, 0, 1, 2), "prenorm": (False, True),
    }  # fmt: skip
    choices = [(fixed[name],) if name in fixed else values for name, values in free.items()]
    for values in itertools.product(*choices):
        graph = GraphConfig(**{**fixed, **dict(zip(free, values, strict=True))})
        if is_possible(num_experts, graph):
            yield graph


def conv_of(num_experts: int, graph: GraphConfig, dim: int = DIM, seed: int = 0) -> GraphConv:
    return filled(GraphConv(dim, num_experts, graph, init_std=1.0), seed)


def coupling_of(num_experts: int, graph: GraphConfig, norm: str = "rms", dim: int = DIM, seed: int = 0) -> Coupling:
    ffn = FFNConfig(num_experts=num_experts, graph=graph)
    config = ModelConfig.model_validate({"dim": dim, "norm": norm, "ffn": ffn})
    return filled(Coupling(config, out_std=1.0), seed)


def results_of(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], upstream_seed: int = 3
) -> list[Tensor]:
    """A function's value, and the gradients of its input and of parameters; zeros where there is none."""
    x = x.detach().requires_grad_()
    y = function(x)
    upstream = random(*y.shape, seed=upstream_seed).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *parameters], upstream, allow_unused=True, materialize_grads=True)
    return [y.detach(), *gradients]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], what: object = "") -> None:
    """Equal to 1e-12 of what is compared, or of one where that is small."""
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, (what, place)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), (what, place, (a - b).abs().max())


def plain_sources(messages: MessagePassing, i: int) -> list[int]:
    """Whom expert i listens to: the largest logits, of equal ones the first."""
    graph, logits_EE = messages.adjacency.config, messages.adjacency.logits_EE
    others = [j for j in range(messages.adjacency.num_experts) if j != i or graph.self_edges]
    if graph.max_neighbors is None or logits_EE is None:
        return others
    return sorted(others, key=lambda j: (-logits_EE[i, j].item(), j))[: graph.max_neighbors]


def plain_weights(messages: MessagePassing, i: int) -> dict[int, Tensor | float]:
    """A_ij of each source j of expert i."""
    graph, logits_EE = messages.adjacency.config, messages.adjacency.logits_EE
    sources = plain_sources(messages, i)
    weights: dict[int, Tensor | float]
    if logits_EE is None:
        weights = dict.fromkeys(sources, 1.0)
    elif graph.adjacency == "sigmoid":
        weights = {j: logits_EE[i, j].exp() / (1 + logits_EE[i, j].exp()) for j in sources}
    else:
        weights = {j: 1 / sum((logits_EE[i, k] - logits_EE[i, j]).exp() for k in sources) for j in sources}
    divisor = {"none": 1.0, "count": len(sources), "degree": sum(weights.values())}[graph.normalize]
    return {j: weight / divisor for j, weight in weights.items()}


def plain_similarity(messages: MessagePassing, receiver_D: Tensor, sender_D: Tensor) -> Tensor:
    """a_ij, number by number."""
    dim = len(receiver_D)
    inner = sum(receiver_D[d] * sender_D[d] for d in range(dim))
    kind = messages.adjacency.config.similarity
    if kind == "gate":
        pair = messages.similarity.pair
        z = sum(pair.weight[0, d] * receiver_D[d] + pair.weight[0, dim + d] * sender_D[d] for d in range(dim))
        return 1 / (1 + (-(z + pair.bias[0])).exp())
    if kind == "dot":
        return 1 / (1 + (-inner / dim**0.5).exp())
    lengths = [sum(v_D[d] ** 2 for d in range(dim)) ** 0.5 for v_D in (receiver_D, sender_D)]
    return inner / (lengths[0] * lengths[1])


def plain_conv(conv: GraphConv, h_ED: Tensor) -> Tensor:
    """h_i + GELU(N Σ_j A_ij a_ij h_j + S h_i) of one token."""
    rows, held_ED = [], h_ED
    if conv.prenorm:
        h_ED = torch.stack([h_D / (sum(x * x for x in h_D) / len(h_D) + 1e-6).sqrt() for h_D in h_ED])
    for i in range(len(h_ED)):
        z_D = conv.own.weight @ h_ED[i] + conv.own.bias
        if conv.messages is not None:
            m_D = torch.zeros(h_ED.shape[1], dtype=h_ED.dtype)
            for j, weight in plain_weights(conv.messages, i).items():
                m_D = m_D + weight * plain_similarity(conv.messages, h_ED[i], h_ED[j]) * h_ED[j]
            z_D = z_D + conv.messages.map.weight @ m_D + conv.messages.map.bias
        rows.append(held_ED[i] + z_D * 0.5 * (1 + torch.erf(z_D / 2**0.5)))
    return torch.stack(rows)


def plain_pooling(coupling: Coupling, h_ED: Tensor) -> Tensor:
    """The experts of one token as one vector."""
    num_experts, dim = h_ED.shape
    if coupling.pooling.query_D is not None:
        scores = [sum(coupling.pooling.query_D[d] * h_D[d] for d in range(dim)) / dim**0.5 for h_D in h_ED]
    elif coupling.pooling.logits_E is not None:
        scores = list(coupling.pooling.logits_E)
    else:
        return sum(h_ED.unbind()) / num_experts
    total = sum(score.exp() for score in scores)
    return sum(score.exp() / total * h_D for score, h_D in zip(scores, h_ED, strict=True))


def plain_combiner(coupling: Coupling, y_D: Tensor) -> Tensor:
    """What follows the pooling, for one token."""
    combiner = coupling.combiner
    if combiner is None:
        return y_D
    y_D = combiner.map.weight @ y_D + combiner.map.bias
    if combiner.norm is None:
        return y_D
    y_D = F.gelu(y_D)
    if hasattr(combiner.norm, "bias"):
        centred_D = y_D - y_D.mean()
        deviation = (centred_D.square().mean() + combiner.norm.eps).sqrt()
        return centred_D / deviation * combiner.norm.weight + combiner.norm.bias
    return y_D / (y_D.square().mean() + combiner.norm.eps).sqrt() * combiner.norm.weight


def plain_coupling(coupling: Coupling, h_TED: Tensor) -> Tensor:
    """The whole coupling token by token: [T, D]."""
    tokens = []
    for h_ED in h_TED:
        for conv in coupling.convs:
            h_ED = plain_conv(conv, h_ED)
        tokens.append(plain_combiner(coupling, plain_pooling(coupling, h_ED)))
    return torch.stack(tokens)
