"""Rules of models that tell the class of a text: what belongs to language models alone, and what a head needs."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.classifier import ExpertHeadConfig, LinearHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.errors import Problem

HEAD = "model.classifier"
TOKENS_ONLY = {
    "expert_choice": "experts take a share of a sequence's positions, padding included, and texts differ in length",
    "hash": "texts have no number in a vocabulary",
}
"""Routers that need tokens of a text of fixed length, or tokens at all, and why."""


def task_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield that task and model are not of one kind."""
    tells_classes = isinstance(config.task, SentimentTask)
    if tells_classes and config.model.classifier is None:
        remedy = f"choose model=moe_text_classifier or moe_classifier, or set {HEAD}.kind=linear"
        yield Problem(HEAD, None, "task.kind=sentiment needs a head that tells classes", remedy)
    if not tells_classes and config.model.classifier is not None:
        rule = f"{HEAD} tells the class of a text, and not the next token"
        yield Problem("task.kind", config.task.kind, rule, f"set task=sentiment, or {HEAD}=null")
    if config.model.classifier is not None and config.train.loss_chunk is not None:
        rule = "cuts the logits of tokens, and a classifier has one line of them per text"
        yield Problem("train.loss_chunk", config.train.loss_chunk, rule, "leave it out")


def classifier_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between ``model.classifier``, or that there is none, and the rest of the model."""
    if model.classifier is None:
        yield from language_problems(model)
        return
    yield from next_token_problems(model)
    yield from sight_problems(model)
    yield from head_problems(model)


def language_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what a language model cannot have."""
    if not model.layers:
        remedy = "set at least 1, or choose model=moe_classifier"
        yield Problem("model.layers", 0, f"only a head with experts ({HEAD}.kind=experts) needs no block", remedy)
    if is_whole(model):
        rule = "a token would see the next one, which it is to predict"
        yield Problem("model.attention.causal", False, rule, f"leave it out, or set {HEAD}.kind")


def next_token_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield the settings of models that predict tokens, which a classifier would ignore or cannot follow."""
    kind, ffn = model.ffn.router.kind, model.ffn
    if not model.tie_embeddings:
        rule = "a classifier has no output over tokens"
        yield Problem("model.tie_embeddings", False, rule, "leave it out")
    if model.mtp.depth:
        yield Problem("model.mtp.depth", model.mtp.depth, "a classifier predicts no tokens", "set it to 0")
    if model.depth.kind != "full":
        rule = "chooses a share of the positions of a sequence, padding included, and texts differ in length"
        yield Problem("model.depth.kind", model.depth.kind, rule, "set model.depth.kind=full")
    if ffn.num_experts and ffn.graph is None and kind in TOKENS_ONLY and (kind != "hash" or has_expert_head(model)):
        rule = f"is not for a classifier{' whose head has experts' if kind == 'hash' else ''}: {TOKENS_ONLY[kind]}"
        yield Problem("model.ffn.router.kind", kind, rule, "choose another model/ffn/router, topk for one")
    if ffn.num_noop_experts:
        rule = "is not for a classifier: its records count texts by class and by the expert that takes them"
        yield Problem("model.ffn.num_noop_experts", ffn.num_noop_experts, rule, "set it to 0")
    if model.classifier is not None and model.classifier.num_classes == 1:
        yield Problem(f"{HEAD}.num_classes", 1, "there is nothing to tell apart", "leave it out: the data says it")


def sight_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what does not go with attention that sees a whole text."""
    attention = model.attention
    if not isinstance(attention, GroupedQueryConfig) or attention.causal:
        return
    rule, remedy = "is of causal attention", "leave it out, or set model.attention.causal=true"
    for key in ("window", "full_every", "sinks"):
        value = getattr(attention, key)
        if value:
            yield Problem(f"model.attention.{key}", value, rule, remedy)
    if model.ffn.graph is not None and model.ffn.graph.expert == "block":
        rule = "blocks as experts do not know which places are padding, and would see it"
        remedy = "set model.ffn.graph.expert=ffn, or model.attention.causal=true"
        yield Problem("model.ffn.graph.expert", "block", rule, remedy)


def head_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the head and the layers with experts."""
    ffn = model.ffn
    if isinstance(model.classifier, LinearHeadConfig):
        if not model.layers:
            rule = "without a block only a head with experts is left to learn from the words' vectors"
            yield Problem("model.layers", 0, rule, f"set at least 1, or {HEAD}.kind=experts")
        return
    if not ffn.num_experts:
        rule = f"{HEAD}.kind=experts has as many experts in its head as the layers have, and they have none"
        yield Problem("model.ffn.num_experts", 0, rule, f"set it, or {HEAD}.kind=linear")
    refused = {
        "num_shared_experts": (
            ffn.num_shared_experts,
            "have the width of a token at their end, and a head has classes",
        ),
        "graph": ("set" if ffn.graph else None, "couples experts, and in a head texts choose them"),
    }
    for key, (value, rule) in refused.items():
        if value:
            yield Problem(
                f"model.ffn.{key}", value, f"{HEAD}.kind=experts: {rule}", f"leave it out, or {HEAD}.kind=linear"
            )
    if ffn.capacity.kind != "dropless":
        rule = f"{HEAD}.kind=experts: a text that finds no room would have no class"
        yield Problem("model.ffn.capacity.kind", ffn.capacity.kind, rule, "set model.ffn.capacity.kind=dropless")


def is_whole(model: ModelConfig) -> bool:
    """Return whether a token sees later ones."""
    return isinstance(model.attention, GroupedQueryConfig) and not model.attention.causal


def has_expert_head(model: ModelConfig) -> bool:
    """Return whether the head of a classifier has experts."""
    return isinstance(model.classifier, ExpertHeadConfig)
