"""Attention whose values and outputs are made by experts (SwitchHead), token by token and expert by expert."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from oracle_attention import heads_of, look, turn
from oracle_routers import NEVER, Decision, best, sigmoid
from oracle_tokens import EXPERT_DROPOUT, Token, derived
from torch import Tensor

DRAWS = {"values": 101, "outputs": 102}
"""Each side's draws are its own."""


def decide_for_heads(model, weight_ED: Tensor, token: Token) -> Decision:
    """In each head the best experts by themselves; the chosen ones' sigmoids are the weights."""
    config, heads = model.attention, model.heads
    logits_E = weight_ED @ token.x_D
    scores_E = sigmoid(logits_E)
    ranking = logits_E.tolist()
    if config.expert_dropout:
        draws = token.draws(EXPERT_DROPOUT, len(ranking))
        ranking = [NEVER if u < config.expert_dropout else r for u, r in zip(draws, ranking, strict=True)]
    experts, parts = [], []
    for h in range(heads):
        first = h * config.experts
        experts += [first + e for e in best(ranking[first : first + config.experts], config.top_k)]
        own_E = scores_E[first : first + config.experts]
        parts.append(own_E / own_E.sum() / heads)

    def weigh(chosen: list[int]) -> list[Tensor]:
        return [config.scale * scores_E[e] for e in chosen]

    return Decision(logits_E, torch.cat(parts), ranking, experts, weigh)


def decide(model, weight_ED: Tensor, tokens: list[Token], side: str) -> tuple[list[Token], list[Decision]]:
    """For all valid tokens on one side, which has draws of its own."""
    tokens = [replace(token, seed=derived(token.seed, DRAWS[side])) for token in tokens]
    return tokens, [decide_for_heads(model, weight_ED, token) for token in tokens]


def switchhead(model, w: dict[str, Tensor], x_BSD: Tensor, tokens: list[Token], columns: list[int], places=None):
    """What attention adds to [B, S, D], and tokens and decisions of both sides.

    ``tokens`` are the valid ones and ``columns`` where these stand in their sequences; ``places``: position (or one per
    sequence) by column.
    """
    config, heads = model.attention, model.heads
    width = config.head_dim or model.dim // heads
    size, length = x_BSD.shape[:2]
    places = range(length) if places is None else places
    sides = {side: decide(model, w[f"{side}.router.weight"], tokens, side) for side in DRAWS}

    values = [[[torch.zeros(width, dtype=x_BSD.dtype)] * size for _ in range(heads)] for _ in range(length)]
    for column, token, decision in zip(columns, *sides["values"], strict=True):
        for e, weight in zip(decision.experts, decision.weigh(decision.experts), strict=True):
            place = values[column][e // config.experts]
            place[token.sequence] = place[token.sequence] + weight * (token.x_D @ w["values.experts.weight_LNM"][e])

    def placed(x_BW: Tensor, column: int) -> Tensor:
        """Learned positions are in the tokens already."""
        return turn(x_BW, places[column], config) if model.positions == "rotary" else x_BW

    queries, keys = [], []
    for s, x_BD in enumerate(x_BSD.unbind(1)):
        q_BN, k_BN = (x_BD @ w["qk.weight"].t()).chunk(2, dim=1)
        queries.append([placed(q, s) for q in heads_of(q_BN, heads)])
        keys.append([placed(k, s) for k in heads_of(k_BN, heads)])

    seen: dict[tuple[int, int], Tensor] = {}
    for s in range(length):
        for h in range(heads):
            near = [keys[j][h] for j in range(s + 1)], [torch.stack(values[j][h]) for j in range(s + 1)]
            seen[s, h] = look(queries[s][h], *near, 1 / math.sqrt(width), None)

    y = {(b, s): torch.zeros_like(x_BSD[b, s]) for b in range(size) for s in range(length)}
    for column, token, decision in zip(columns, *sides["outputs"], strict=True):
        for e, weight in zip(decision.experts, decision.weigh(decision.experts), strict=True):
            seen_W = seen[column, e // config.experts][token.sequence]
            place = token.sequence, column
            y[place] = y[place] + weight * (seen_W @ w["outputs.experts.weight_LNM"][e])
    return torch.stack(list(y.values())).view_as(x_BSD), sides
