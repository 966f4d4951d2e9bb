"""The whole model on the whole global batch: blocks, experts token by token, modules ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import oracle_balance as balance
import torch
from oracle_attention import attention, linear
from oracle_capacity import Placed, place_assignments
from oracle_classifier import (
    bayes_scores,
    by_class,
    compacted,
    head,
    lexicon_scores,
    text_by_text,
    text_vectors,
    word_vectors,
)
from oracle_depth import deep_block, is_deep
from oracle_graph import GraphLayer, graph
from oracle_heads import switchhead
from oracle_networks import network, normed, own
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
    places = None

    def is_valid(self, sequence: int, position: int) -> bool:
        return self.labels_BS[sequence, position].item() != IGNORE

    def valid(self, later: int) -> Tensor:
        """By sequence and position of a module that sees ``later`` tokens further."""
        return self.labels_BS[:, later:] != IGNORE

    def token(self, x_D: Tensor, sequence: int, position: int, depth: int, later: int) -> Token:
        """A place in a layer; a module of multi-token prediction has there the token that comes ``later``."""
        size, length = self.ids_BS.shape
        number = sequence * self.split.passes // size
        part = sequence * self.split.passes * self.split.ranks // size
        groups = {"step": 0, "pass": number, "rank": part, "sequence": sequence}
        seed = derived(self.seed, depth)
        return Token(x_D, self.ids_BS[sequence, position + later].item(), sequence, position, length, groups, seed)


@dataclass
class Texts(Batch):
    """Texts with a class each, and which places hold their tokens."""

    valid_BS: Tensor

    def is_valid(self, sequence: int, position: int) -> bool:
        return bool(self.valid_BS[sequence, position])

    def valid(self, later: int) -> Tensor:
        return self.valid_BS

    @property
    def classes(self) -> dict[int, int]:
        """By text, of those that have tokens."""
        return {b: max(labels) for b, labels in enumerate(self.labels_BS.tolist()) if max(labels) != IGNORE}


class Where(NamedTuple):
    """Which layer of the model: the depth of its block, and its part of that if it is not the feed-forward one."""

    depth: int
    part: str = ""

    @property
    def name(self) -> str:
        return f"layer_{self.depth:02d}_{self.part}" if self.part else f"layer_{self.depth:02d}"


@dataclass
class Layer:
    """What happened in one MoE layer, whose parameters' names start with ``name``."""

    name: str
    tokens: list[Token]
    decisions: list[Decision]
    placed: Placed

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def losses(self, ffn) -> dict[str, tuple[float, Tensor]]:
        """Weight and value."""
        return balance.losses(ffn, self.tokens, self.decisions)

    def figures(self, ffn) -> dict[str, object]:
        return balance.layer_figures(ffn.num_experts, self.decisions, self.placed, ffn.num_noop_experts)

    def figures_after_step(self, ffn, w: dict[str, Tensor]) -> dict[str, object]:
        return {}


@dataclass
class HeadLayer(Layer):
    """One side of attention with experts: one loss, and experts of its own number."""

    model: object

    def losses(self, ffn) -> dict[str, tuple[float, Tensor]]:
        config = self.model.attention
        value = balance.entropy_loss(self.tokens, self.decisions, "global", self.model.heads)
        return {"entropy_loss": (config.entropy, value)}

    def figures(self, ffn) -> dict[str, object]:
        return balance.layer_figures(self.model.heads * self.model.attention.experts, self.decisions, self.placed)


def attend(model, w: dict[str, Tensor], name: str, x_BSD: Tensor, batch: Batch, depth: int, later: int):
    """What attention of any kind makes of normed tokens, and what happened on its sides if it has experts."""
    own_w = own(w, name)
    if not getattr(model.attention, "causal", True):
        return text_by_text(model, own_w, depth, x_BSD, batch), {}
    if model.attention.kind != "switchhead":
        return attention(model, own_w, depth, x_BSD, batch.places), {}
    places = [(b, s) for b in range(x_BSD.shape[0]) for s in range(x_BSD.shape[1]) if batch.is_valid(b, s + later)]
    tokens, columns = [batch.token(x_BSD[b, s], b, s, depth, later) for b, s in places], [s for _, s in places]
    y_BSD, sides = switchhead(model, own_w, x_BSD, tokens, columns, batch.places)
    layers = {}
    for side, (tokens, decisions) in sides.items():
        placed = Placed([[(e, None) for e in d.experts] for d in decisions])
        layers[Where(depth, side)] = HeadLayer(f"{name}.{side}", tokens, decisions, placed, model)
    return y_BSD, layers


def shared_experts(ffn, w: dict[str, Tensor], x_BSD: Tensor) -> Tensor:
    y_BSD = network(ffn.activation, x_BSD, w["gate_up.weight"].t(), w["down.weight"].t())
    return y_BSD * sigmoid((x_BSD * w["token_gate.weight"][0]).sum(-1, keepdim=True)) if ffn.shared_gate else y_BSD


def moe(ffn, w: dict[str, Tensor], name: str, bias: list[float] | None, x_BSD: Tensor, batch: Batch, depth, later: int):
    """All sequences through one MoE layer: its output and what happened."""
    places = [(b, s) for b in range(x_BSD.shape[0]) for s in range(x_BSD.shape[1])]
    x = dict(zip(places, x_BSD.flatten(0, 1).unbind(), strict=True))
    meant = [(b, s) for b, s in places if batch.is_valid(b, s + later)]
    tokens = [batch.token(x[b, s], b, s, depth, later) for b, s in meant]
    num_choices = ffn.num_experts + ffn.num_noop_experts
    decisions = route(Router(ffn.router, num_choices, ffn.top_k, own(w, "router"), bias), tokens)
    placed = place_assignments(ffn.capacity, ffn.num_experts, ffn.top_k, tokens, decisions, ffn.num_noop_experts)
    experts = {key: value.unbind() for key, value in own(w, "experts").items()}
    kind = ffn.expert_activation or ffn.activation
    y = {place: torch.zeros_like(x_D) for place, x_D in x.items()}
    for place, outputs in zip(meant, placed.outputs, strict=True):
        for e, weight in outputs:
            up_bias, down_bias = (experts[key][e] if ffn.expert_bias else 0.0 for key in BIASES)
            y_D = network(kind, x[place], experts["gate_up_LDF2"][e], experts["down_LFD"][e], up_bias) + down_bias
            y[place] += weight * y_D
    y_BSD = torch.stack(list(y.values())).view_as(x_BSD)
    if ffn.num_shared_experts:
        y_BSD = y_BSD + shared_experts(ffn, own(w, "shared"), x_BSD)
    return y_BSD, Layer(name, tokens, decisions, placed)


BIASES = ("gate_up_bias_LF2", "down_bias_LD")


def experts_of(w: dict[str, Tensor], num: int) -> list[dict[str, Tensor]]:
    """The parameters of each expert: their first dimension counts the experts."""
    return [{key: value[e] for key, value in own(w, "experts").items()} for e in range(num)]


def dense_network(kind: str, w: dict[str, Tensor], x_BSD: Tensor) -> Tensor:
    """Of linear maps, with biases if they have some."""
    up_bias, down_bias = (w.get(f"{name}.bias", 0.0) for name in ("gate_up", "down"))
    return network(kind, x_BSD, w["gate_up.weight"].t(), w["down.weight"].t(), up_bias) + down_bias


def dense_block(model, kind: str, w: dict[str, Tensor], depth: int, x_BSD: Tensor) -> Tensor:
    """A block without experts in it."""
    x_BSD = x_BSD + attention(model, own(w, "attention"), depth, normed(model, w, "attention_norm", x_BSD))
    return x_BSD + dense_network(kind, own(w, "ffn"), normed(model, w, "ffn_norm", x_BSD))


def coupled_blocks(model, w: dict[str, Tensor], name: str, x_BSD: Tensor, batch: Batch, depth: int, later: int):
    """The blocks that stand in one's place, and what happened between them."""
    layer_w, ffn = own(w, f"{name}.layer"), model.ffn
    kind = ffn.expert_activation or ffn.activation
    experts = experts_of(layer_w, ffn.num_experts)
    outputs = [dense_block(model, kind, own(expert, "block"), depth, x_BSD) for expert in experts]
    y_BSD, layer = graph(model, layer_w, f"{name}.layer", x_BSD, outputs, batch.valid(later))
    return x_BSD + y_BSD, layer


def coupled_networks(model, w: dict[str, Tensor], name: str, x_BSD: Tensor, batch: Batch, later: int):
    """The networks that stand in one's place, and what happened between them."""
    ffn, outputs = model.ffn, []
    for expert in experts_of(w, ffn.num_experts):
        up_bias, down_bias = (expert[key] if ffn.expert_bias else 0.0 for key in BIASES)
        kind, weights = ffn.expert_activation or ffn.activation, (expert["gate_up_LDF2"], expert["down_LFD"])
        outputs.append(network(kind, x_BSD, *weights, up_bias) + down_bias)
    return graph(model, w, name, x_BSD, outputs, batch.valid(later))


def has_experts(ffn, depth: int) -> bool:
    """Whether the feed-forward part of a block has some."""
    return ffn.num_experts > 0 and depth >= ffn.first_dense and depth % ffn.every == ffn.every - 1


def block(model, w: dict[str, Tensor], name: str, biases, x_BSD: Tensor, batch: Batch, depth: int, later: int = 0):
    """One block, and what happened in its layers with experts."""
    ffn, own_w = model.ffn, own(w, name)
    if ffn.graph is not None and ffn.graph.expert == "block" and has_experts(ffn, depth):
        x_BSD, layer = coupled_blocks(model, w, name, x_BSD, batch, depth, later)
        return x_BSD, {Where(depth): layer}
    normed_BSD = normed(model, own_w, "attention_norm", x_BSD)
    attended_BSD, layers = attend(model, w, f"{name}.attention", normed_BSD, batch, depth, later)
    x_BSD = x_BSD + attended_BSD
    normed_BSD, ffn_w = normed(model, own_w, "ffn_norm", x_BSD), own(own_w, "ffn")
    if not has_experts(ffn, depth):
        return x_BSD + dense_network(ffn.activation, ffn_w, normed_BSD), layers
    if ffn.graph is not None:
        y_BSD, layer = coupled_networks(model, ffn_w, f"{name}.ffn", normed_BSD, batch, later)
    else:
        bias = biases.get(f"{name}.ffn.router.bias_E")
        y_BSD, layer = moe(ffn, ffn_w, f"{name}.ffn", bias, normed_BSD, batch, depth, later)
    return x_BSD + y_BSD, layers | {Where(depth): layer}


def any_block(model, w: dict[str, Tensor], name: str, biases, x_BSD: Tensor, batch: Batch, depth: int):
    """One of the model's own blocks, whether all tokens pass it or some."""
    if not is_deep(model, depth):
        return block(model, w, name, biases, x_BSD, batch, depth)

    def plain(x_BCD: Tensor, some):
        return block(model, w, f"{name}.block", biases, x_BCD, some, depth)

    x_BSD, layer, layers = deep_block(model, w, name, x_BSD, batch, plain)
    return x_BSD, {Where(depth, "depth"): layer, **layers}


def embedded(w: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
    """Each token's vector, with that of its place if places have vectors."""
    x_BSD = w["embedding_VD"][ids_BS]
    return x_BSD + torch.stack([w["positions_SD"][s] for s in range(ids_BS.shape[1])]) if "positions_SD" in w else x_BSD


def trunk(model, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch, x_BSD: Tensor):
    """The normed output of the last block, given the tokens' vectors, and the layers with experts by place."""
    found: dict[Where, Layer | GraphLayer] = {}
    for depth in range(model.layers):
        x_BSD, layers = any_block(model, w, f"blocks.{depth}", biases, x_BSD, batch, depth)
        found |= layers
    sizes_count = not model.layers or (model.classifier and not model.classifier.token_norm)
    return x_BSD if sizes_count else normed(model, w, "norm", x_BSD), found


@dataclass
class ClassLayer(Layer):
    """A layer whose tokens' texts have classes."""

    classes: dict[int, int]
    num_classes: int

    def figures(self, ffn) -> dict[str, object]:
        shared = by_class(self.classes, self.num_classes, ffn.num_experts, self.tokens, self.decisions)
        return super().figures(ffn) | shared


def classify(model, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Texts):
    """The logits of each text in training, and the layers with experts by place."""
    words_BSD, texts = word_vectors(model, w, batch), batch
    bayes, lexicon = model.classifier.naive_bayes, model.classifier.lexicon
    ids_BS, valid_BS = compacted(batch.ids_BS, batch.valid_BS, batch.seed, model.classifier.token_dropout)
    batch = Texts(ids_BS, batch.labels_BS, batch.split, batch.seed, valid_BS)
    x_BSD, found = trunk(model, w, biases, batch, words_BSD)
    result = head(model, w, biases, text_vectors(model, x_BSD, batch), batch)
    if bayes:
        ratios_NC = torch.tensor(biases["naive_bayes.ratios_NC"], dtype=torch.float64)
        for b in result.logits:
            ids = texts.ids_BS[b][texts.valid_BS[b]].tolist()
            result.logits[b] = result.logits[b] + bayes_scores(bayes, w["naive_bayes.weight_NC"], ratios_NC, ids)
    if lexicon:
        ratings = dict(zip(biases["lexicon.hashes_N"], biases["lexicon.ratings_N"], strict=True))
        for b in result.logits:
            ids = texts.ids_BS[b][texts.valid_BS[b]].tolist()
            result.logits[b] = result.logits[b] + lexicon_scores(lexicon, w["lexicon.weight_NC"], ratings, ids)
    if result.tokens:
        found |= {Where(model.layers, "head"): Layer("head", result.tokens, result.decisions, result.placed)}
    told = batch.classes, model.classifier.num_classes
    return result.logits, {
        where: ClassLayer(**vars(layer), classes=told[0], num_classes=told[1]) for where, layer in found.items()
    }


def forward(model, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch):
    """Logits of the whole batch, first the model's, then those of each module, which ends where the text does; and the
    layers with experts by place."""
    to_tokens, head_bias = w.get("head.weight", w["embedding_VD"]).t(), w.get("head.bias", 0.0)
    x_BSD, found = trunk(model, w, biases, batch, embedded(w, batch.ids_BS))
    logits = [x_BSD @ to_tokens + head_bias]
    for k in range(model.mtp.depth):
        later, depth = k + 1, model.layers + k
        module = own(w, f"mtp.{k}")
        seen_BSD = normed(model, module, "embedding_norm", embedded(w, batch.ids_BS[:, later:]))
        x_BSD = normed(model, module, "hidden_norm", x_BSD[:, :-1])
        x_BSD = linear(torch.cat([seen_BSD, x_BSD], dim=2), module, "project")
        x_BSD, layers = block(model, w, f"mtp.{k}.block", biases, x_BSD, batch, depth, later)
        found |= layers
        x_BSD = normed(model, module, "norm", x_BSD)
        logits.append(x_BSD @ to_tokens + head_bias)
    return logits, found
