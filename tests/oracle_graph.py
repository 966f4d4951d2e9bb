"""The dense graph-coupled layer, its figures and its loss: one position, one expert and one pair of experts at a time;
sequences, which do not meet, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from oracle_attention import linear
from oracle_networks import bell, normed, own
from oracle_routers import sigmoid
from torch import Tensor


@dataclass
class Told:
    """What was said in one graph layer about the N valid tokens at one position.

    Attributes:
        strength: [N] by receiver and sender; no entry: no edge.
        received: norms [N] by receiver.
        sent: norms [N] of what each expert sent.
    """

    strength: dict[tuple[int, int], Tensor]
    received: list[Tensor]
    sent: list[Tensor]


@dataclass
class GraphLayer:
    """What happened in one such layer, whose parameters' names start with ``name``.

    Attributes:
        num_tokens: valid ones.
        cosines: per position, by pair of experts, between what they add to the N valid tokens there: [N].
        told: per position, per graph layer with messages.
    """

    name: str
    num_tokens: int = 0
    cosines: list[list[list[Tensor]]] = field(default_factory=list)
    told: list[list[Told]] = field(default_factory=list)

    def losses(self, ffn) -> dict[str, tuple[float, Tensor]]:
        """Weight and value."""
        pairs = [(i, j) for i in range(ffn.num_experts) for j in range(ffn.num_experts) if i != j]
        total = sum(((cosines[i][j] ** 2).sum() for cosines in self.cosines for i, j in pairs), torch.zeros(()))
        return {"orthogonality_loss": (ffn.graph.orthogonality, total / max(1, len(pairs)) / self.num_tokens)}

    def figures(self, ffn) -> dict[str, object]:
        """What is reported of the tokens."""
        experts = range(ffn.num_experts)
        means = [[total(c[i][j] for c in self.cosines) / self.num_tokens for j in experts] for i in experts]
        others = [means[i][j] for i in experts for j in experts if i != j]
        layers = [list(told) for told in zip(*self.told, strict=True)]

        def strength(layer: list[Told], i: int, j: int) -> float:
            return total(told.strength[i, j] for told in layer if (i, j) in told.strength) / self.num_tokens

        return {
            "similarity": sum(others) / max(1, len(others)),
            "cosines": means,
            "effective_rank": effective_rank(means),
            "message_strength": [[[strength(layer, i, j) for j in experts] for i in experts] for layer in layers],
            "message_norm": [
                total(norm_N for told in layer for norm_N in told.received)
                / total(norm_N for told in layer for norm_N in told.sent)
                for layer in layers
            ],
        }

    def figures_after_step(self, ffn, w: dict[str, Tensor]) -> dict[str, object]:
        """What is reported of the edges, which have moved."""
        convs = [own(w, f"{self.name}.coupling.convs.{m}") for m in range(ffn.graph.layers)]
        edges = [weights_of_edges(ffn, conv) for conv in convs]
        if not any(edges):
            return {}
        experts = range(ffn.num_experts)
        entropies = []
        for weights in edges:
            for i in experts:
                incoming = [weights[i, j].item() for j in experts if (i, j) in weights]
                shares = [weight / sum(incoming) for weight in incoming]
                entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
        return {
            "adjacency": [
                [[weights[i, j].item() if (i, j) in weights else 0.0 for j in experts] for i in experts]
                for weights in edges
            ],
            "adjacency_entropy": sum(entropies) / len(entropies),
        }


def total(parts: Iterable[Tensor]) -> float:
    """Of all numbers in them."""
    return sum(part.detach().sum().item() for part in parts)


def effective_rank(means: list[list[float]]) -> float:
    """The matrix has no negative eigenvalues, so that its singular values are those."""
    values = torch.linalg.svdvals(torch.tensor(means, dtype=torch.float64)).tolist()
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def weights_of_edges(ffn, w: dict[str, Tensor]) -> dict[tuple[int, int], Tensor]:
    """By receiver and sender; ``w`` are the parameters of one graph layer."""
    graph, weights = ffn.graph, {}
    if graph.max_neighbors == 0:
        return {}
    logits = w.get("messages.adjacency.logits_EE")
    for i in range(ffn.num_experts):
        sources = [j for j in range(ffn.num_experts) if graph.self_edges or j != i]
        if logits is not None and graph.max_neighbors is not None:
            sources = sorted(sources, key=lambda j: (-logits[i, j].item(), j))[: graph.max_neighbors]
        if logits is None:
            edges = dict.fromkeys(sources, torch.ones((), dtype=torch.float64))
        elif graph.adjacency == "sigmoid":
            edges = {j: sigmoid(logits[i, j]) for j in sources}
        else:
            edges = {j: torch.exp(logits[i, j]) / sum(torch.exp(logits[i, k]) for k in sources) for j in sources}
        by = {"none": 1.0, "count": len(sources), "degree": sum(edges.values())}[graph.normalize]
        weights |= {(i, j): edge / by for j, edge in edges.items()}
    return weights


def dot(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Of vectors side by side: [B]."""
    return (a_BD * b_BD).sum(-1)


def size(x_BD: Tensor) -> Tensor:
    return dot(x_BD, x_BD).sqrt()


def cosine(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    return dot(a_BD, b_BD) / (size(a_BD) * size(b_BD))


def likeness(kind: str, w: dict[str, Tensor], receiver_BD: Tensor, sender_BD: Tensor) -> Tensor:
    """How much the one has to say to the other: [B]."""
    if kind == "cosine":
        return cosine(receiver_BD, sender_BD)
    if kind == "dot":
        return sigmoid(dot(receiver_BD, sender_BD) / math.sqrt(sender_BD.shape[1]))
    both = torch.cat([receiver_BD, sender_BD], dim=1)
    return sigmoid(dot(both, w["messages.similarity.pair.weight"][0]) + w["messages.similarity.pair.bias"][0])


def conv(ffn, w: dict[str, Tensor], weights, held: list[Tensor], valid_B: Tensor) -> tuple[list[Tensor], Told]:
    """One graph layer at one position."""
    seen = [h_BD / torch.sqrt(dot(h_BD, h_BD) / h_BD.shape[1] + 1e-6).unsqueeze(1) for h_BD in held]
    seen = seen if ffn.graph.prenorm else held
    after, told = [], Told({}, [], [size(h_BD)[valid_B] for h_BD in seen])
    for i, own_BD in enumerate(seen):
        inner_BD = linear(own_BD, w, "own")
        if weights:
            message_BD = torch.zeros_like(own_BD)
            for j, other_BD in enumerate(seen):
                if (i, j) in weights:
                    strength_B = weights[i, j] * likeness(ffn.graph.similarity, w, own_BD, other_BD)
                    message_BD = message_BD + strength_B.unsqueeze(1) * other_BD
                    told.strength[i, j] = strength_B[valid_B]
            inner_BD = inner_BD + linear(message_BD, w, "messages.map")
            told.received.append(size(message_BD)[valid_B])
        after.append(held[i] + bell(inner_BD))
    return after, told


def pooled(kind: str, w: dict[str, Tensor], held: list[Tensor]) -> Tensor:
    """One vector of all."""
    if kind == "mean":
        return sum(held) / len(held)
    if kind == "weighted":
        scores = [w["pooling.logits_E"][e].expand(len(h_BD)) for e, h_BD in enumerate(held)]
    else:
        scores = [dot(w["pooling.query_D"], h_BD) / math.sqrt(h_BD.shape[1]) for h_BD in held]
    whole_B = sum(torch.exp(score_B) for score_B in scores)
    shares = [torch.exp(score_B) / whole_B for score_B in scores]
    return sum(share_B.unsqueeze(1) * h_BD for share_B, h_BD in zip(shares, held, strict=True))


def combined(model, w: dict[str, Tensor], y_BD: Tensor) -> Tensor:
    """What follows the pooling."""
    kind = model.ffn.graph.combiner
    if kind == "none":
        return y_BD
    y_BD = linear(y_BD, w, "combiner.map")
    return y_BD if kind == "linear" else normed(model, w, "combiner.norm", bell(y_BD))


def graph(model, w: dict[str, Tensor], name: str, x_BSD: Tensor, outputs: list[Tensor], valid_BS: Tensor):
    """All sequences through one layer: what it adds, and what happened.

    ``w`` are the layer's parameters, ``outputs`` what each expert made of the input [B, S, D].
    """
    ffn, layer, y = model.ffn, GraphLayer(name), []
    convs = [own(w, f"coupling.convs.{m}") for m in range(ffn.graph.layers)]
    edges = [weights_of_edges(ffn, conv_w) for conv_w in convs]
    coupling = own(w, "coupling")
    for s, (x_BD, valid_B) in enumerate(zip(x_BSD.unbind(1), valid_BS.unbind(1), strict=True)):
        held = [output_BSD[:, s] for output_BSD in outputs]
        added = [(h_BD - x_BD if ffn.graph.expert == "block" else h_BD)[valid_B] for h_BD in held]
        told = []
        for conv_w, weights in zip(convs, edges, strict=True):
            held, said = conv(ffn, conv_w, weights, held, valid_B)
            told += [said] if weights else []
        y.append(combined(model, coupling, pooled(ffn.graph.pooling, coupling, held)))
        layer.num_tokens += int(valid_B.sum())
        layer.cosines.append([[cosine(one, other) for other in added] for one in added])
        layer.told.append(told)
    return torch.stack(y, dim=1), layer
