"""The classes of texts, and which experts took them. Under expert parallelism all ranks classify the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.task import SentimentTask
from moe_train.data.labelled.corpus import open_labelled
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.inference.load import Trained
from moe_train.models.transformer import Transformer
from moe_train.moe.context import RoutingContext
from moe_train.moe.layer import MoELayer
from moe_train.moe.routing import Routing

ROWS = 32
"""Texts per forward pass."""
MOST_TOKENS = 64
"""A longer text is not told token by token."""


@dataclass(frozen=True)
class ExpertUse:
    """What one layer's experts did with a text.

    Attributes:
        first_choice: [E] share of the text's tokens that have each expert as first choice; of a head, whose one token
            is the text, 1 for one expert.
        weight: [E] mean over the tokens of the expert's weight in the sum, 0 where it is not chosen.
        by_token: per token its text and its first choice; empty for a long text, and for a head.
    """

    first_choice: tuple[float, ...]
    weight: tuple[float, ...]
    by_token: tuple[tuple[str, int], ...]

    def told(self) -> dict[str, Any]:
        """Return it for readers, experts that took nothing left out."""
        experts = {
            f"expert {e}": {"first_choice": round(self.first_choice[e], 4), "weight": round(self.weight[e], 4)}
            for e in sorted(range(len(self.weight)), key=lambda e: -self.weight[e])
            if self.weight[e] or self.first_choice[e]
        }
        return {**experts, **({"tokens": [[token, e] for token, e in self.by_token]} if self.by_token else {})}


@dataclass(frozen=True)
class Explanation:
    """What a classifier says of one text.

    Attributes:
        text: the text.
        told: the most probable class.
        probabilities: by class.
        tokens: that the model read.
        left_out: tokens beyond data.seq_len, which it did not read.
        layers: by the layer's name in records (``layer_00``, ``layer_02_head``) the use of its experts.
    """

    text: str
    told: str
    probabilities: dict[str, float]
    tokens: int
    left_out: int
    layers: dict[str, ExpertUse]

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "text": self.text,
            "class": self.told,
            "probabilities": {name: round(share, 4) for name, share in self.probabilities.items()},
            "tokens": self.tokens,
            "tokens_left_out": self.left_out,
            "experts": {layer: use.told() for layer, use in self.layers.items()},
        }


def classes_of(trained: Trained) -> tuple[str, ...]:
    """Return the names of a classifier's classes, in the order of their numbers."""
    task = trained.config.task
    assert isinstance(task, SentimentTask) and task.classes, "a classifier's run keeps the names of its classes"
    return task.classes


def heldout_texts(trained: Trained, world: World) -> tuple[list[str], Tensor]:
    """Return the texts that a classifier's run held out, and their classes, [N] int64. Collective.

    Raises:
        DataError: the texts of the run cannot be read.
    """
    config = trained.config
    assert isinstance(config.task, SentimentTask), "only classifiers have labelled texts"
    store = open_labelled(config.data, config.tokenizer, config.task, world.leader_first).heldout
    return [store.text(number) for number in range(store.num_texts)], torch.from_numpy(store.labels_N.copy())


@torch.no_grad()
def class_probabilities(trained: Trained, texts: Sequence[str]) -> Tensor:
    """Return the probability of each class for each text, [N, C] fp32 on the CPU. Collective where experts are sharded.

    Args:
        trained: a classifier; with sharded experts all ranks give the same texts.
        texts: their tokens beyond data.seq_len are left out.

    Raises:
        ConfigError: texts without a token.
    """
    tokens = [tokens_of(trained, text)[: trained.config.data.seq_len] for text in texts]
    empty = [number for number, ids in enumerate(tokens) if not ids]
    if empty:
        raise ConfigError([Problem(f"text {n}", None, "has no tokens", "give at least one word") for n in empty])
    chunks = [tokens[first : first + ROWS] for first in range(0, len(tokens), ROWS)]
    probabilities = [logits_of(trained, chunk).to(torch.float32).softmax(dim=1).cpu() for chunk in chunks]
    return torch.cat(probabilities) if probabilities else torch.zeros(0, len(classes_of(trained)))


def explain(trained: Trained, text: str) -> Explanation:
    """Classify one text and say which experts took it. Collective where experts are sharded.

    Args:
        trained: a classifier, all of whose ranks are given the same text.
        text: at least one word.

    Raises:
        ConfigError: the text has no tokens.
    """
    ids = tokens_of(trained, text)
    if not ids:
        raise ConfigError(Problem("text", text, "has no tokens", "give at least one word"))
    read = ids[: trained.config.data.seq_len]
    with torch.no_grad(), watched_routers(trained.model) as routings:
        shares = logits_of(trained, [read]).to(torch.float32).softmax(dim=1)[0].tolist()
    classes = classes_of(trained)
    words = [trained.tokenizer.decode([token]) for token in read]
    layers = {name: use_of(routing, words) for name, routing in routings.items()}
    told = classes[max(range(len(shares)), key=lambda c: shares[c])]
    return Explanation(text, told, dict(zip(classes, shares, strict=True)), len(read), len(ids) - len(read), layers)


def tokens_of(trained: Trained, text: str) -> list[int]:
    """Return the tokens of a text as its run's own texts were cut: without the white space around them."""
    return trained.tokenizer.encode(text.strip())


def logits_of(trained: Trained, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return the scores [B, C] of texts given as tokens, each with at least one."""
    device = trained.model.embedding_VD.device
    lengths_B = torch.tensor([len(ids) for ids in tokens])
    tokens_BS = torch.zeros(len(tokens), int(lengths_B.max()), dtype=torch.int64)
    for row, ids in enumerate(tokens):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
    valid_BS = torch.arange(tokens_BS.shape[1]) < lengths_B.unsqueeze(1)
    tokens_BS = tokens_BS.to(device)
    logits_BC: Tensor = trained.model(tokens_BS, RoutingContext.of(tokens_BS, valid_BS.to(device))).logits_BC
    return logits_BC


@contextmanager
def watched_routers(model: Transformer) -> Iterator[dict[str, Routing]]:
    """Collect what the routers of a model decide in the forward pass within, by the name of their layer in records."""
    found: dict[str, Routing] = {}

    def keep(name: str, _router: nn.Module, _inputs: object, routing: Routing) -> None:
        found[name] = routing

    with ExitStack() as stack:
        for key, layer in model.expert_layers.items():
            if isinstance(layer, MoELayer):
                assert isinstance(layer.router, nn.Module), "routers are modules, whose passes can be watched"
                stack.callback(layer.router.register_forward_hook(partial(keep, key.name)).remove)
        yield found


def use_of(routing: Routing, words: Sequence[str]) -> ExpertUse:
    """Return the use of a layer's experts by one text.

    Args:
        routing: of its tokens, T of them, or of the text as one.
        words: its tokens as text.
    """
    num_tokens, num_experts = routing.logits_TE.shape
    first_T, weights_TK = routing.experts_TK[:, 0], routing.weights_TK.to(torch.float64)
    weight_E = weights_TK.new_zeros(num_experts).scatter_add(0, routing.experts_TK.flatten(), weights_TK.flatten())
    share_E = torch.bincount(first_T, minlength=num_experts) / num_tokens
    is_told = num_tokens == len(words) and 1 < num_tokens <= MOST_TOKENS
    by_token = tuple(zip(words, first_T.tolist(), strict=True)) if is_told else ()
    return ExpertUse(tuple(share_E.tolist()), tuple((weight_E / num_tokens).tolist()), by_token)
