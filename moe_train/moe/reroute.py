"""A second chance for what found no room: the token's next-best expert that has some."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.moe.queues import Queues


def reroute(
    ranking_TE: Tensor, experts_TK: Tensor, refused_TK: Tensor, kept_TK: Tensor, queues: Queues
) -> tuple[Tensor, Tensor]:
    """Move refused choices to experts with room, in rounds.

    A token prefers experts by ranking, without those that it chose at first. In each round its refused choices, in
    their order, ask the next experts that it has not asked yet, one each; an expert admits the earliest tokens. Waits
    for the device once a round, to stop when nobody can ask any more: mostly after few of the possible E - K rounds.

    Args:
        ranking_TE: [T, E] larger is better, -inf: must not be chosen; ties to the lowest expert.
        experts_TK: [T, K] int64, the router's choices.
        refused_TK: [T, K] bool, those that found no room.
        kept_TK: [T, K] bool, those that did.
        queues: of the experts, with the room before any was admitted.

    Returns:
        [T, K] int64, the choices as they now are, and [T, K] bool, those that were moved.
    """
    preferred_TE, num_preferred_T1 = preferences(ranking_TE, experts_TK)
    queues = queues.without(experts_TK, kept_TK)
    moved_TK = torch.zeros_like(kept_TK)
    num_asked_T1 = torch.zeros_like(num_preferred_T1)
    while True:
        open_TK = refused_TK & ~moved_TK
        turn_TK = num_asked_T1 + open_TK.cumsum(dim=1) - 1
        asking_TK = open_TK & (turn_TK < num_preferred_T1)
        if queues.peers.sum(asking_TK.sum()).item() == 0:
            return experts_TK, moved_TK
        asked_TK = preferred_TE.gather(1, torch.where(asking_TK, turn_TK, 0))
        admitted_TK = queues.admitted(asked_TK, asking_TK, priority=None)
        queues = queues.without(asked_TK, admitted_TK)
        experts_TK, moved_TK = torch.where(admitted_TK, asked_TK, experts_TK), moved_TK | admitted_TK
        num_asked_T1 = num_asked_T1 + asking_TK.sum(dim=1, keepdim=True)


def preferences(ranking_TE: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's experts [T, E], best first, and how many of them [T, 1] it may ask: not those it chose."""
    others_TE = ranking_TE.detach().scatter(1, experts_TK, float("-inf"))
    return others_TE.argsort(dim=1, descending=True, stable=True), (others_TE > float("-inf")).sum(dim=1, keepdim=True)


def reroute_reference(
    ranking_TE: Tensor,
    experts_TK: Tensor,
    refused_TK: Tensor,
    kept_TK: Tensor,
    group_T: Tensor,
    limits_Q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Do what `reroute` does, choice by choice, with the tokens of all ranks in one table."""
    ranking, experts, groups = ranking_TE.tolist(), experts_TK.tolist(), group_T.tolist()
    num_experts = ranking_TE.shape[1]
    room, moved = limits_Q.tolist(), torch.zeros_like(kept_TK)
    for t, k in kept_TK.nonzero().tolist():
        room[groups[t] * num_experts + experts[t][k]] -= 1
    allowed = [[e for e, score in enumerate(row) if score > float("-inf")] for row in ranking]
    unasked = [
        sorted((e for e in row if e not in experts[t]), key=lambda e, t=t: (-ranking[t][e], e))  # type: ignore[misc]
        for t, row in enumerate(allowed)
    ]
    asking = refused_TK.nonzero().tolist()
    while asking := [(t, k, unasked[t].pop(0)) for t, k, *_ in asking if unasked[t]]:
        for t, k, expert in asking.copy():
            if room[groups[t] * num_experts + expert] > 0:
                room[groups[t] * num_experts + expert] -= 1
                experts[t][k], moved[t, k] = expert, True
                asking.remove((t, k, expert))
    return torch.tensor(experts, dtype=torch.int64).view_as(experts_TK), moved
