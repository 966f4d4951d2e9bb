"""A classifier on the whole global batch: each text by itself and unpadded where it can be, class by class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from oracle_attention import attention, linear
from oracle_capacity import Placed
from oracle_networks import own
from oracle_routers import Router, route
from oracle_tokens import TOKEN_DROPOUT, Token, derived, unit
from torch import Tensor


def left(valid: list[int], sequence: int, length: int, seed: int, dropout: float) -> list[int]:
    """The positions of a text that stay in training; the one with the largest draw always does."""
    draws = {s: unit(derived(seed, TOKEN_DROPOUT), sequence * length + s) for s in valid}
    return [s for s in valid if draws[s] >= dropout or draws[s] == max(draws.values())]


def compacted(ids_BS: Tensor, valid_BS: Tensor, seed: int, dropout: float) -> tuple[Tensor, Tensor]:
    """Texts without the words that are left out, filled up at their ends."""
    kept_ids, kept = torch.zeros_like(ids_BS), torch.zeros_like(valid_BS)
    for b, (ids, valid_S) in enumerate(zip(ids_BS.tolist(), valid_BS, strict=True)):
        for place, s in enumerate(left(valid_S.nonzero().flatten().tolist(), b, len(ids), seed, dropout)):
            kept_ids[b, place], kept[b, place] = ids[s], True
    return kept_ids, kept


def run_row(run: list[int], num_rows: int) -> int:
    """Row of a run of tokens in the table."""
    return run_hash(run) % num_rows


def run_hash(run: list[int]) -> int:
    """What stands for a run of tokens."""
    hashed = run[0]
    for token in run[1:]:
        hashed = (hashed * 1_000_003 + token) % (2**31 - 1)
    return (hashed * 1_000_003 + len(run)) % (2**31 - 1)


def run_rows(ids: list[int], longest: int, num_rows: int) -> set[int]:
    """Rows of all tokens and runs of a text, each once."""
    runs = (ids[s : s + n] for n in range(1, longest + 1) for s in range(len(ids) - n + 1))
    return {run_row(run, num_rows) for run in runs}


def bayes_scores(config, weight_NC: Tensor, ratios_NC: Tensor, ids: list[int]) -> Tensor:
    """What the features of a text say of each class."""
    rows = sorted(run_rows(ids, config.longest, config.rows))
    return config.scale * sum((weight_NC[row] * ratios_NC[row] for row in rows), torch.zeros_like(weight_NC[0]))


def lexicon_scores(config, weight_NC: Tensor, ratings: dict[int, float], ids: list[int]) -> Tensor:
    """What the rated words of a text say of each class; ratings by the hash of their run."""
    sums = {"praise": 0.0, "blame": 0.0}
    for s in range(len(ids)):
        words = [ratings.get(run_hash(ids[s : s + n])) for n in range(1, config.longest + 1) if s + n <= len(ids)]
        known = [rating for rating in words if rating is not None]
        if known:  # the last is that of the longest word
            sums["praise" if known[-1] > 0 else "blame"] += known[-1]
    return config.scale * (sums["praise"] * weight_NC[0] + sums["blame"] * weight_NC[1])


def word_vectors(model, w: dict[str, Tensor], batch) -> Tensor:
    """Vectors of the words that are left, with those of the runs that end there in the text as it was."""
    ngrams, table = model.classifier.ngrams, w.get("ngrams.table_ND")
    x_BSD = torch.zeros(*batch.ids_BS.shape, model.dim, dtype=w["embedding_VD"].dtype)
    for b, (ids, valid_S) in enumerate(zip(batch.ids_BS.tolist(), batch.valid_BS, strict=True)):
        words = valid_S.nonzero().flatten().tolist()
        for place, s in enumerate(left(words, b, len(ids), batch.seed, model.classifier.token_dropout)):
            x_BSD[b, place] = w["embedding_VD"][ids[s]]
            for n in range(2, ngrams.longest + 1 if ngrams else 2):
                if s >= n - 1:
                    x_BSD[b, place] = (
                        x_BSD[b, place] + ngrams.scale * table[run_row(ids[s - n + 1 : s + 1], len(table))]
                    )
    return x_BSD


def text_by_text(model, w: dict[str, Tensor], depth: int, x_BSD: Tensor, batch) -> Tensor:
    """Attention of each text alone, without its padding."""
    y_BSD = torch.zeros_like(x_BSD)
    for b in range(len(x_BSD)):
        length = sum(batch.is_valid(b, s) for s in range(x_BSD.shape[1]))
        if length:
            y_BSD[b, :length] = attention(model, w, depth, x_BSD[b : b + 1, :length])[0]
    return y_BSD


def text_vectors(model, x_BSD: Tensor, batch) -> dict[int, Tensor]:
    """The vector of each text that has tokens."""
    power = {"mean": 1.0, "root": 0.5}[model.classifier.pool]
    places = {b: [s for s in range(x_BSD.shape[1]) if batch.is_valid(b, s)] for b in range(len(x_BSD))}
    return {b: sum(x_BSD[b, s] for s in seen) / len(seen) ** power for b, seen in places.items() if seen}


def mlp(w: dict[str, Tensor], e: int, num_maps: int, x_D: Tensor) -> Tensor:
    """One expert of a head."""
    for m in range(num_maps):
        x_D = x_D * (x_D > 0) if m else x_D
        x_D = x_D @ w[f"maps.{m}.weight_LNM"][e] + w[f"maps.{m}.bias_LM"][e]
    return x_D


@dataclass
class HeadResult:
    """Logits of the texts that have tokens, and what happened in a head with experts."""

    logits: dict[int, Tensor]
    tokens: list[Token]
    decisions: list
    placed: Placed


def head(model, w: dict[str, Tensor], biases: dict[str, list[float]], texts: dict[int, Tensor], batch) -> HeadResult:
    """Scores of the classes."""
    own_w, ffn = own(w, "head"), model.ffn
    if model.classifier.kind == "linear":
        return HeadResult({b: linear(x_D, w, "head") for b, x_D in texts.items()}, [], [], Placed([]))
    tokens = []
    for b, x_D in texts.items():
        place = batch.token(x_D, b, 0, model.layers, 0)
        tokens.append(Token(x_D, place.id, b, 0, 1, place.groups, place.seed))
    router = Router(ffn.router, ffn.num_experts, ffn.top_k, own(own_w, "router"), biases.get("head.router.bias_E"))
    decisions = route(router, tokens)
    experts_w, num_maps = own(own_w, "experts"), len(model.classifier.hidden_dims) + 1
    placed = Placed([list(zip(d.experts, d.weigh(d.experts), strict=True)) for d in decisions])
    logits = {
        token.sequence: sum(weight * mlp(experts_w, e, num_maps, token.x_D) for e, weight in outputs)
        for token, outputs in zip(tokens, placed.outputs, strict=True)
    }
    return HeadResult(logits, tokens, decisions, placed)


def by_class(classes: dict[int, int], num_classes: int, num_experts: int, tokens, decisions) -> dict[str, object]:
    """How the experts of one layer share the classes of the texts."""
    counts = [[0] * num_experts for _ in range(num_classes)]
    gates = [0.0] * num_experts
    for token, decision in zip(tokens, decisions, strict=True):
        counts[classes[token.sequence]][decision.experts[0]] += 1
        for e, weight in zip(decision.experts, decision.weigh(decision.experts), strict=True):
            gates[e] += weight.item() / len(tokens)
    columns = list(zip(*counts, strict=True))
    number, mean = len(tokens), sum(gates) / num_experts
    index = 0.0
    for column in columns:
        entropy = -sum(n / sum(column) * math.log(n / sum(column)) for n in column if n)
        index += sum(column) / number * (1 - entropy / math.log(num_classes))
    return {
        "by_class": counts,
        "utilisation": [sum(column) / number for column in columns],
        "specialisation": index,
        "load_balance_variance": sum((gate - mean) ** 2 for gate in gates) / num_experts,
    }
