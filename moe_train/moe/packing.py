"""Which experts should share a rank, by what each had to do: integers only, the same answer on every rank.

As DeepSeek's EPLB packs them (github.com/deepseek-ai/EPLB, ``balanced_packing``): the heaviest first, each to the
lightest rank that has room, the same number of experts everywhere. Two things differ. EPLB also makes copies of heavy
experts, which is for inference: in training each copy would be a parameter to keep equal. And EPLB starts from nothing,
where here an expert that moves costs the reading of its weights and moments: so exchanges of two experts are tried
first, and nothing moves for a gain that nobody would notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEAST_GAIN = 0.02
"""Fall of the imbalance, in mean loads of a rank, below which nothing moves: less than loads differ between windows."""
EVEN_ENOUGH = 1.01
"""Imbalance at which no further exchange is looked for."""


def rank_loads(loads_E: Sequence[int], experts: Sequence[int], num_ranks: int) -> list[int]:
    """Return what each rank had to do.

    Args:
        loads_E: assignments of each expert.
        experts: expert at each place; rank r has the places from r · E / P.
        num_ranks: ranks P; divides E.
    """
    held = len(experts) // num_ranks
    return [sum(loads_E[e] for e in experts[r * held : (r + 1) * held]) for r in range(num_ranks)]


def imbalance(loads_E: Sequence[int], experts: Sequence[int], num_ranks: int) -> float:
    """Return largest over mean load of a rank: the time of a layer relative to an even one; 1.0 when all are idle."""
    loads = rank_loads(loads_E, experts, num_ranks)
    return max(loads) * num_ranks / sum(loads) if sum(loads) else 1.0


def choose_places(loads_E: Sequence[int], current: Sequence[int], num_ranks: int, num_blocks: int = 1) -> list[int]:
    """Return the expert at each place that evens out these loads; the current ones where that gains too little.

    Args:
        loads_E: assignments of each expert.
        current: expert at each place now.
        num_ranks: ranks P; divides E.
        num_blocks: blocks of consecutive ranks that experts do not leave (nodes, for routers that limit the nodes which
            a token visits); divides P.
    """
    assert num_ranks % num_blocks == 0, f"{num_blocks} blocks must divide the {num_ranks} ranks"
    size = len(current) // num_blocks
    starts = range(0, len(current), size)
    blocks = [even_out(loads_E, current[start : start + size], num_ranks // num_blocks) for start in starts]
    chosen = [expert for block in blocks for expert in block]
    gain = imbalance(loads_E, current, num_ranks) - imbalance(loads_E, chosen, num_ranks)
    return chosen if gain >= LEAST_GAIN else list(current)


def even_out(loads_E: Sequence[int], current: Sequence[int], num_ranks: int) -> list[int]:
    """Return these experts in an order that evens out the ranks' loads; of equally even ones that with fewer moves."""
    packed = settled(pack(loads_E, current, num_ranks), current)
    enough = max(imbalance(loads_E, packed, num_ranks), EVEN_ENOUGH)
    candidates = [list(current), exchanged(loads_E, current, num_ranks, enough), packed]

    def cost(experts: Sequence[int]) -> tuple[float, int]:
        moves = sum(new != old for new, old in zip(experts, current, strict=True))
        return max(imbalance(loads_E, experts, num_ranks), EVEN_ENOUGH), moves

    return min(candidates, key=cost)


def pack(loads_E: Sequence[int], experts: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the experts of each rank by EPLB's rule; of equal loads the lower index comes first."""
    held = len(experts) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for expert in sorted(experts, key=lambda e: (-loads_E[e], e)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < held), key=lambda r: (totals[r], r))
        ranks[rank].append(expert)
        totals[rank] += loads_E[expert]
    return ranks


def settled(groups: Sequence[Sequence[int]], current: Sequence[int]) -> list[int]:
    """Give each group the rank that holds most of it already, and each expert that stays its place.

    Pairs of group and rank are taken in order of what they share: not always the most that all could keep together.
    """
    held = len(groups[0])
    ranks = [current[r * held : (r + 1) * held] for r in range(len(groups))]
    pairs = [(-len(set(group) & set(rank)), r, g) for r, rank in enumerate(ranks) for g, group in enumerate(groups)]
    group_at: dict[int, int] = {}
    for _, r, g in sorted(pairs):
        if r not in group_at and g not in group_at.values():
            group_at[r] = g
    placed: list[int] = []
    for r, rank in enumerate(ranks):
        arrived = iter(sorted(set(groups[group_at[r]]) - set(rank)))
        placed += [expert if expert in groups[group_at[r]] else next(arrived) for expert in rank]
    return placed


def exchanged(loads_E: Sequence[int], current: Sequence[int], num_ranks: int, enough: float) -> list[int]:
    """Exchange experts of the fullest rank for lighter ones of others while that helps and is not enough.

    Args:
        loads_E: assignments of each expert.
        current: expert at each place now.
        num_ranks: ranks P.
        enough: imbalance at which to stop.
    """
    experts_PL = torch.tensor(current).view(num_ranks, -1)
    loads_PL = torch.tensor([loads_E[e] for e in current]).view(num_ranks, -1)
    held = loads_PL.shape[1]
    for _ in current:  # each exchange makes the sum of squares smaller, but it could do so very slowly
        totals_P = loads_PL.sum(dim=1)
        full = int(totals_P.argmax())
        if int(totals_P[full]) * num_ranks <= enough * int(totals_P.sum()):
            break
        less_LPL = loads_PL[full].view(-1, 1, 1) - loads_PL
        after_LPL = torch.maximum(totals_P[full] - less_LPL, totals_P.view(-1, 1) + less_LPL)
        best = int(after_LPL.argmin())  # exchanges inside of the fullest rank leave it as it is: never better
        if int(after_LPL.view(-1)[best]) >= int(totals_P[full]):
            break
        here, there = (full, best // (num_ranks * held)), (best // held % num_ranks, best % held)
        for values_PL in (experts_PL, loads_PL):
            values_PL[here], values_PL[there] = values_PL[there].clone(), values_PL[here].clone()
    return [int(expert) for expert in experts_PL.flatten().tolist()]
