"""Who is computed: queues, budgets of devices and the reroute loop, one assignment at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oracle_routers import NEVER, Decision, fp32
from oracle_tokens import Token, by_group
from torch import Tensor

SCOPES = {"global": "pass", "sequence": "sequence", "rank": "rank"}
"""The tokens that compete, as a token names its groups."""


@dataclass
class Assignment:
    """A candidate: one choice of one token.

    Attributes:
        token: index of its token.
        column: which choice.
        expert: where it goes; rerouting changes it.
        kept: whether it is computed.
        rerouted: whether it was moved.
    """

    token: int
    column: int
    expert: int
    kept: bool = True
    rerouted: bool = False


@dataclass
class Placed:
    """What is computed for each token, and what became of the rest."""

    outputs: list[list[tuple[int, Tensor]]]
    dropped_capacity: int = 0
    dropped_device: int = 0
    dropped_router: int = 0
    rerouted: int = 0


def place_assignments(
    config, num_experts: int, top_k: int, tokens: list[Token], decisions: list[Decision], num_noops: int = 0
) -> Placed:
    """Apply the capacity rule of training. Experts from ``num_experts`` on do nothing: nobody is a candidate there."""
    candidates = [
        Assignment(t, k, d.experts[k])
        for t, d in enumerate(decisions)
        for k in range(len(d.experts))
        if d.chosen[k] and not d.declined[k] and d.experts[k] < num_experts
    ]
    placed = Placed([[] for _ in tokens], dropped_router=sum(sum(d.declined) for d in decisions))
    if config.kind == "factor":
        share = top_k / (num_experts + num_noops)
        limit_experts(config, num_experts, share, tokens, decisions, candidates)
        placed.dropped_capacity = sum(not a.kept for a in candidates)
        placed.rerouted = sum(a.rerouted for a in candidates)
    if config.kind == "device":
        limit_devices(config, num_experts, top_k, tokens, decisions, candidates)
        placed.dropped_device = sum(not a.kept for a in candidates)
    for t, decision in enumerate(decisions):
        own = [a for a in candidates if a.token == t]
        experts = list(decision.experts)
        for a in own:
            experts[a.column] = a.expert
        weights = decision.weigh(experts)
        kept = [a for a in own if a.kept]
        factor = 1.0
        if config.kind == "factor" and config.renormalize == "after" and kept:
            factor = sum(weights[a.column] for a in own) / sum(weights[a.column] for a in kept)
        placed.outputs[t] = [(a.expert, weights[a.column] * factor) for a in kept]
    return placed


def limit_experts(config, num_experts, share, tokens, decisions, candidates: list[Assignment]) -> None:
    """Each expert takes the first of its queue; balanced it would have that share of the tokens."""

    def rank(a: Assignment) -> tuple:
        decision, token = decisions[a.token], tokens[a.token]
        priority = 0.0
        if config.policy == "probability":
            priority = fp32(decision.weigh(decision.experts)[a.column].item())
        if config.policy == "random":
            priority = token.overflow_bits(len(decision.experts))[a.column]
        return (a.column if config.order == "choice" else 0, -priority, a.token, a.column)

    for members in by_group(tokens, SCOPES[config.scope]):
        inside = set(members)
        group = [a for a in candidates if a.token in inside]
        wanted = max(config.minimum, math.ceil(config.factor * len(members) * share))
        limit = min(len(members), wanted)
        for e in range(num_experts):
            for a in sorted((a for a in group if a.expert == e), key=rank)[limit:]:
                a.kept = False
        if config.reroute:
            reroute(num_experts, limit, decisions, group)


def reroute(num_experts: int, limit: int, decisions: list[Decision], group: list[Assignment]) -> None:
    """Rounds of proposals to the next-best experts, until all are placed or have asked everywhere."""
    room = [limit - sum(a.kept and a.expert == e for a in group) for e in range(num_experts)]
    untried = {}
    for t in {a.token for a in group}:
        ranking = decisions[t].ranking
        order = sorted(range(num_experts), key=lambda e: (-ranking[e], e))
        untried[t] = [e for e in order if e not in decisions[t].experts and ranking[e] != NEVER]
    waiting = sorted((a for a in group if not a.kept), key=lambda a: (a.token, a.column))
    while waiting:
        proposals = [(a, untried[a.token].pop(0)) for a in waiting if untried[a.token]]
        for a, e in proposals:
            if room[e] > 0:
                room[e] -= 1
                a.expert, a.kept, a.rerouted = e, True, True
        waiting = [a for a, _ in proposals if not a.kept]


def limit_devices(config, num_experts, top_k, tokens, decisions, candidates: list[Assignment]) -> None:
    """Each device takes the largest weights up to its budget; exempt sequences are first, and always kept."""

    def rank(a: Assignment) -> tuple:
        weight = fp32(decisions[a.token].weigh(decisions[a.token].experts)[a.column].item())
        return (not is_exempt(a), -weight, a.token, a.column)

    def is_exempt(a: Assignment) -> bool:
        return tokens[a.token].exemption < config.exempt_fraction

    for members in by_group(tokens, SCOPES[config.scope]):
        inside = set(members)
        limit = math.ceil(config.factor * len(members) * top_k / config.devices)
        for device in range(config.devices):
            size = num_experts // config.devices
            queue = [a for a in candidates if a.token in inside and a.expert // size == device]
            for a in sorted(queue, key=rank)[limit:]:
                a.kept = is_exempt(a)
