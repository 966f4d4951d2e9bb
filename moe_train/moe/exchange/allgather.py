"""Every token goes to every rank of the group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.riders import riders_of
from moe_train.dist.underway import Underway, send_sums, send_to_all
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange.journey import Cargo, Journey, Transit, split
from moe_train.moe.exchange.sharded import ShardedExchange
from moe_train.moe.exchange.visits import among
from moe_train.ops.keep import decide


@dataclass(frozen=True)
class GatherLeg:
    """An all-gather of tokens, and a reduce-scatter of what each rank made of them.

    Attributes:
        rows: the tokens of all ranks, in order of ranks, on their way here.
        experts_RK: [R, K] int64, their experts on this rank, which are known before the tokens come.
        weights_RK: [R, K] their weights, which came with the experts.
        group: the EP group; each rank has as many tokens.
    """

    rows: Underway
    experts_RK: Tensor
    weights_RK: Tensor
    group: dist.ProcessGroup

    def arrive(self) -> Cargo:
        """Wait for the tokens."""
        return Cargo(self.rows.arrive(), self.experts_RK, self.weights_RK)

    def start_back(self, sums_RD: Tensor) -> Underway:
        """Begin to add up what the ranks made of each token."""
        return send_sums(sums_RD, self.group.size(), self.group.group_name)

    def end_back(self, parts_ND: Tensor) -> Tensor:
        """Return the sums: they were added up on the way."""
        return parts_ND


@dataclass(frozen=True)
class GatherExchange(ShardedExchange):
    """All ranks see all tokens, and do their part; each must have as many tokens.

    No counts travel: for few ranks and many choices, where nearly every token visits every rank anyway. A token costs
    (P - 1) · (D · b + K · (w + 4)) bytes out and (P - 1) · D · b home, wherever its experts are. Ids and weights of all
    parts share one collective, rows take one for each part, and so do sums.
    """

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each token to all ranks. Waits for the device once, while they travel."""
        parts = [part_TD for part_TD, _ in split(x_TD, plan, self.parts)]
        num_ranks, name = self.group.size(), self.group.group_name
        ids_TK = plan.experts_TK if plan.all_kept else torch.where(plan.kept_TK, plan.experts_TK, self.num_experts)
        labels = send_to_all(plan.weights_TK, num_ranks, name, ids_TK)
        rows = [send_to_all(part_TD, num_ranks, name) for part_TD in parts]
        lengths = [len(part_TD) for part_TD in parts]
        weights = by_part(labels.arrive(), num_ranks, lengths)
        experts = by_part(among(riders_of(labels.buffer, ids_TK.shape[1]), self.experts), num_ranks, lengths)
        held = len(self.experts)
        numbers = decide(lambda: torch.stack([(experts_RK < held).sum() for experts_RK in experts]).tolist())
        legs = [GatherLeg(*leg, self.group) for leg in zip(rows, experts, weights, strict=True)]
        return Transit([Journey(leg, number) for leg, number in zip(legs, numbers, strict=True)])


def by_part(x_NK: Tensor, num_ranks: int, lengths: list[int]) -> list[Tensor]:
    """Cut what all ranks [P · T, K] sent at once into what belongs to each part: [P · length, K]."""
    parts = torch.split(x_NK.view(num_ranks, sum(lengths), x_NK.shape[1]), lengths, dim=1)
    return [part.flatten(0, 1) for part in parts]
