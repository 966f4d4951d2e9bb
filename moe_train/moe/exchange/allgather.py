"""Every token goes to every rank of the group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.dist.underway import Underway, send_sums, send_to_all
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange.journey import Cargo, Journey, Transit, split
from moe_train.moe.exchange.sharded import ShardedExchange
from moe_train.ops.keep import decide


@dataclass(frozen=True)
class GatherLeg:
    """An all-gather of tokens, and a reduce-scatter of what each rank made of them.

    Attributes:
        rows: the tokens of all ranks, in order of ranks, on their way here.
        weights: their weights.
        experts_RK: [R, K] int64, their experts on this rank, which are known before the tokens come.
        group: the EP group; each rank has as many tokens.
    """

    rows: Underway
    weights: Underway
    experts_RK: Tensor
    group: dist.ProcessGroup

    def arrive(self) -> Cargo:
        """Wait for the tokens."""
        return Cargo(self.rows.arrive(), self.experts_RK, self.weights.arrive())

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
    (P - 1) · (D · b + K · (w + 4)) bytes out and (P - 1) · D · b home, wherever its experts are.
    """

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send each token to all ranks. Waits for the device once, while they travel."""
        parts = split(x_TD, plan, self.parts)
        ids = self.send(torch.where(plan.kept_TK, plan.experts_TK, self.num_experts).to(torch.int32))
        travelling = [(self.send(part_TD), self.send(part.weights_TK)) for part_TD, part in parts]
        experts = self.here(ids.arrive().to(torch.int64), [len(part_TD) for part_TD, _ in parts])
        held = len(self.experts)
        numbers = decide(lambda: torch.stack([(experts_RK < held).sum() for experts_RK in experts]).tolist())
        legs = [GatherLeg(*both, e_RK, self.group) for both, e_RK in zip(travelling, experts, strict=True)]
        return Transit([Journey(leg, number) for leg, number in zip(legs, numbers, strict=True)])

    def send(self, x_TM: Tensor) -> Underway:
        """Begin to give all ranks this one's rows."""
        return send_to_all(x_TM, self.group.size(), self.group.group_name)

    def here(self, experts_NK: Tensor, lengths: list[int]) -> list[Tensor]:
        """Return by part the experts on this rank of the tokens [P · T, K] of all ranks, or their number L for none."""
        held = len(self.experts)
        local_NK = experts_NK - self.experts.start
        local_NK = torch.where((local_NK >= 0) & (local_NK < held), local_NK, held)
        by_rank = local_NK.view(self.group.size(), -1, local_NK.shape[1])
        return [part.flatten(0, 1) for part in torch.split(by_rank, lengths, dim=1)]
