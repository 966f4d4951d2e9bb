"""Top-k with a fixed rule for ties."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Return the indices [T, k] of the k largest scores of each row, best first; among equals the lowest index wins.

    `torch.topk` promises no order among equals, and CPU and GPU differ: a router whose weights are still equal would
    send tokens elsewhere on each device. `argmax` does promise the first maximum. No index comes twice: when fewer than
    k scores of a row are above -inf, the others follow by index. Not differentiable.
    """
    # What is taken becomes -inf, and must be less than what never was on offer.
    remaining_TE = scores_TE.detach().clamp(min=torch.finfo(scores_TE.dtype).min)
    chosen = []
    for _ in range(k):
        best_T1 = remaining_TE.argmax(dim=1, keepdim=True)
        chosen.append(best_T1)
        remaining_TE.scatter_(1, best_T1, float("-inf"))
    return torch.cat(chosen, dim=1)


def top_k_reference(scores_TE: Tensor, k: int) -> Tensor:
    """Do the same with Python's sort."""
    rows = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in scores_TE.tolist()]  # type: ignore[misc]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), k)
