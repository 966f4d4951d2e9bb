"""The whole model on the whole global batch: blocks, feed-forward networks, experts token by token, modules ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from oracle_attention import attention, linear, norm
from oracle_capacity import Placed, place_assignments
from oracle_routers import Decision, Router, route, sigmoid
from oracle_tokens import Token, derived
from torch import Tensor

IGNORE = -100
BOUNDARY = 5
"""Token that ends a document: no module of multi-token prediction predicts beyond it."""


@dataclass(frozen=True)
class Split:
    """How a global batch is cut into runs of sequences, which only rules that count over a pass or a rank see.

    Attributes:
        passes: micro-batches; each is one forward pass over all ranks.
        ranks: parts of a pass.
    """

    passes: int = 1
    ranks: int = 1


@dataclass
class Batch:
    """One global batch of one step."""

    ids_BS: Tensor
    labels_BS: Tensor
    split: Split
    seed: int

    def is_valid(self, sequence: int, position: int) -> bool:
        return self.labels_BS[sequence, position].item() != IGNORE

    def token(self, x_D: Tensor, sequence: int, position: int, depth: int, later: int) -> Token:
        """A place in a layer; a module of multi-token prediction has there the token that comes ``later``."""
        size, length = self.ids_BS.shape
        number = sequence * self.split.passes // size
        part = sequence * self.split.passes * self.split.ranks // size
        groups = {"step": 0, "pass": number, "rank": part, "sequence": sequence}
        seed = derived(self.seed, depth)
        return Token(x_D, self.ids_BS[sequence, position + later].item(), sequence, position, length, groups, seed)


@dataclass
class Layer:
    """What happened in one MoE layer, whose parameters' names start with ``name``."""

    name: str
    tokens: list[Token]
    decisions: list[Decision]
    placed: Placed


def own(w: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parameters of a part of the model, by their names in it."""
    return {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}


def bell(x: Tensor) -> Tensor:
    """x·Φ(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def network(kind: str, x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | float = 0.0) -> Tensor:
    """Weights as [in, out]; of a gated kind the first half of the first one's columns is the gate."""
    h = x @ up + up_bias
    if kind == "relu":
        return (h * (h > 0)) @ down
    if kind == "gelu":
        return bell(h) @ down
    gate, up = h.chunk(2, dim=-1)
    if kind == "swiglu":
        return (gate * sigmoid(gate) * up) @ down
    if kind == "geglu":
        return (bell(gate) * up) @ down
    assert kind == "swiglu_clamped"
    gate = torch.where(gate > 7, 7.0, gate)
    up = torch.where(up > 7, 7.0, torch.where(up < -7, -7.0, up))
    return (gate * sigmoid(1.702 * gate) * (up + 1)) @ down


def shared_experts(ffn, w: dict[str, Tensor], x_BSD: Tensor) -> Tensor:
    y_BSD = network(ffn.activation, x_BSD, w["gate_up.weight"].t(), w["down.weight"].t())
    return y_BSD * sigmoid((x_BSD * w["token_gate.weight"][0]).sum(-1, keepdim=True)) if ffn.shared_gate else y_BSD


def moe(ffn, w: dict[str, Tensor], name: str, bias: list[float] | None, x_BSD: Tensor, batch: Batch, depth, later: int):
    """All sequences through one MoE layer: its output and what happened."""
    places = [(b, s) for b in range(x_BSD.shape[0]) for s in range(x_BSD.shape[1])]
    x = dict(zip(places, x_BSD.flatten(0, 1).unbind(), strict=True))
    tokens = [batch.token(x[b, s], b, s, depth, later) for b, s in places if batch.is_valid(b, s + later)]
    decisions = route(Router(ffn.router, ffn.num_experts, ffn.top_k, own(w, "router"), bias), tokens)
    placed = place_assignments(ffn.capacity, ffn.num_experts, ffn.top_k, tokens, decisions)
    experts = {key: value.unbind() for key, value in own(w, "experts").items()}
    kind = ffn.expert_activation or ffn.activation
    y = {place: torch.zeros_like(x_D) for place, x_D in x.items()}
    for token, outputs in zip(tokens, placed.outputs, strict=True):
        for e, weight in outputs:
            up_bias, down_bias = (experts[key][e] if ffn.expert_bias else 0.0 for key in BIASES)
            y_D = network(kind, token.x_D, experts["gate_up_LDF2"][e], experts["down_LFD"][e], up_bias) + down_bias
            y[token.sequence, token.position] += weight * y_D
    y_BSD = torch.stack(list(y.values())).view_as(x_BSD)
    if ffn.num_shared_experts:
        y_BSD = y_BSD + shared_experts(ffn, own(w, "shared"), x_BSD)
    return y_BSD, Layer(name, tokens, decisions, placed)


BIASES = ("gate_up_bias_LF2", "down_bias_LD")


def block(model, w: dict[str, Tensor], name: str, biases, x_BSD: Tensor, batch: Batch, depth: int, later: int = 0):
    """One block, and what happened in it if it is MoE."""
    ffn, own_w = model.ffn, own(w, name)
    normed_BSD = norm(x_BSD, own_w["attention_norm.weight"], model.norm_eps)
    x_BSD = x_BSD + attention(model, own(own_w, "attention"), depth, normed_BSD)
    normed_BSD = norm(x_BSD, own_w["ffn_norm.weight"], model.norm_eps)
    if ffn.num_experts > 0 and depth >= ffn.first_dense and depth % ffn.every == ffn.every - 1:
        bias = biases.get(f"{name}.ffn.router.bias_E")
        y_BSD, layer = moe(ffn, own(own_w, "ffn"), f"{name}.ffn", bias, normed_BSD, batch, depth, later)
        return x_BSD + y_BSD, layer
    up, down = own_w["ffn.gate_up.weight"].t(), own_w["ffn.down.weight"].t()
    return x_BSD + network(ffn.activation, normed_BSD, up, down), None


def forward(model, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch):
    """Logits of the whole batch, first the model's, then those of each module, which ends where the text does; and the
    MoE layers by depth."""
    head = w.get("head.weight", w["embedding_VD"]).t()
    embedded_BSD = w["embedding_VD"][batch.ids_BS]
    found: dict[int, Layer | None] = {}
    x_BSD = embedded_BSD
    for depth in range(model.layers):
        x_BSD, found[depth] = block(model, w, f"blocks.{depth}", biases, x_BSD, batch, depth)
    x_BSD = norm(x_BSD, w["norm.weight"], model.norm_eps)
    logits = [x_BSD @ head]
    for k in range(model.mtp.depth):
        later, depth = k + 1, model.layers + k
        module = own(w, f"mtp.{k}")
        seen_BSD = norm(embedded_BSD[:, later:], module["embedding_norm.weight"], model.norm_eps)
        x_BSD = norm(x_BSD[:, :-1], module["hidden_norm.weight"], model.norm_eps)
        x_BSD = linear(torch.cat([seen_BSD, x_BSD], dim=2), module, "project")
        x_BSD, found[depth] = block(model, w, f"mtp.{k}.block", biases, x_BSD, batch, depth, later)
        x_BSD = norm(x_BSD, module["norm.weight"], model.norm_eps)
        logits.append(x_BSD @ head)
    return logits, {depth: layer for depth, layer in found.items() if layer is not None}
