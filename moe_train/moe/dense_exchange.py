"""How every token reaches every expert, and what each of them made of it comes home.

The counterpart of the sparse exchange for dense layers, at the same seam: nothing is chosen, so that no counts travel
and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from moe_train.dist.comm import all_to_all_rows, gather_rows_of_all


class DenseExchange(Protocol):
    """Brings all tokens to all experts and all results back."""

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""

    def dispatch(self, x_BSD: Tensor) -> Tensor:
        """Bring this rank's tokens to all ranks: [B, S, D] to [R, S, D], those of all ranks in their order."""

    def combine(self, y_RSLD: Tensor) -> Tensor:
        """Bring home what the experts of all ranks made of this rank's tokens: [R, S, L, D] to [B, S, E, D]."""


@dataclass(frozen=True)
class LocalDenseExchange:
    """All experts are here: both journeys are the identity.

    Attributes:
        num_experts: experts E of a layer.
    """

    num_experts: int

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds: all."""
        return range(self.num_experts)

    def dispatch(self, x_BSD: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x_BSD

    def combine(self, y_RSLD: Tensor) -> Tensor:
        """Return the results as they are."""
        return y_RSLD


@dataclass(frozen=True)
class AllGatherExchange:
    """Experts are sharded over the ranks of a group in runs of L = E / P.

    A token is needed everywhere, its results only at home: tokens travel by all-gather, results by all-to-all (if those
    were gathered, P times as much would move). The coupling runs at home, where all E results of a token meet.
    Backwards the gradients of the results take the all-to-all the other way, and those of the tokens are summed by
    reduce-scatter, in their own dtype.

    With b bytes per value each rank sends per token, forward and backward alike, (P - 1) · D · b for the token and
    (E - L) · D · b for the results: (P - 1) · (1 + L) · D · b. The meter of `moe_train.dist.comm` counts what stays on
    the rank, too: (P + E) · D · b. A sparse layer sends at most 2 · min(K, P) · D · b each way.

    Attributes:
        group: the EP group; each rank has as many tokens.
        num_experts: experts E of a layer, a multiple of the group's size P.
    """

    group: dist.ProcessGroup
    num_experts: int

    @property
    def experts(self) -> range:
        """Global indices of the experts that this rank holds."""
        return held_by(self.group, self.num_experts)

    def dispatch(self, x_BSD: Tensor) -> Tensor:
        """Gather the tokens of all ranks."""
        tokens_RSD: Tensor = gather_rows_of_all(x_BSD, self.group.size(), self.group.group_name)
        return tokens_RSD

    def combine(self, y_RSLD: Tensor) -> Tensor:
        """Send each rank the results for its tokens, and set those that come side by side in order of experts."""
        num_ranks = self.group.size()
        batch = len(y_RSLD) // num_ranks
        share = [batch] * num_ranks
        arrived = all_to_all_rows(y_RSLD, share, share, self.group.group_name)  # [P · B, S, L, D] by source rank
        by_rank = arrived.unflatten(0, (num_ranks, batch)).movedim(0, 2)  # [B, S, P, L, D]
        results_BSED: Tensor = by_rank.flatten(2, 3)
        return results_BSED


def held_by(group: dist.ProcessGroup, num_experts: int) -> range:
    """Return the global indices of the experts that this rank holds of those sharded over a group in equal runs."""
    held = num_experts // group.size()
    return range(group.rank() * held, (group.rank() + 1) * held)
