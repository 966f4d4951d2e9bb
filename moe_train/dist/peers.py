"""The ranks whose tokens are parts of the same batch, as far as routing must know of them.

A router that balances over the whole batch, or a capacity that is counted over it, asks these three questions; one
process answers them alone. None is differentiable: they decide who goes where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.comm import sum_over


class Peers(Protocol):
    """All ranks call the same questions in the same order; tensors have the same shape on each."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks."""

    def before(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks before this one: zeros on the first."""

    def gather(self, x_TD: Tensor) -> tuple[Tensor, int]:
        """Return all ranks' rows [W · T, ...] in order of ranks, and the index of this rank's first."""


@dataclass(frozen=True)
class Alone:
    """This process has the whole batch."""

    def sum(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x.detach()

    def before(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(x)

    def gather(self, x_TD: Tensor) -> tuple[Tensor, int]:
        """Return ``x``."""
        return x_TD.detach(), 0


@dataclass(frozen=True)
class Together:
    """The batch lies on the ranks of a group, in order of ranks.

    Attributes:
        group: the ranks.
    """

    group: dist.ProcessGroup

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks."""
        return sum_over(x, self.group)

    def before(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks before this one."""
        all_WN, _ = self.gather(x.unsqueeze(0))
        return all_WN[: self.group.rank()].sum(dim=0)

    def gather(self, x_TD: Tensor) -> tuple[Tensor, int]:
        """Return all ranks' rows in order of ranks, and the index of this rank's first."""
        x_TD = x_TD.detach().contiguous()
        parts = [torch.empty_like(x_TD) for _ in range(self.group.size())]
        dist.all_gather(parts, x_TD, group=self.group)
        return torch.cat(parts), self.group.rank() * x_TD.shape[0]
