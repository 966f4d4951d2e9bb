"""Which assignments are computed: a plan of integers, made before any token moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from moe_train.config.schema import CapacityConfig, DroplessConfig, FactorCapacityConfig
from moe_train.moe.router import Routing


@dataclass(frozen=True)
class Plan:
    """What will be computed.

    Attributes:
        experts_TK: [T, K] int64, global expert of each assignment.
        weights_TK: [T, K] its weight, at least fp32, differentiable.
        kept_TK: [T, K] bool; what is not kept contributes nothing, and the residual stream carries the token.
        all_kept: True when kept_TK is known to be all true without looking (no limit, no padding).
    """

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    all_kept: bool


@dataclass(frozen=True)
class Capacity:
    """The rule of a layer.

    Attributes:
        config: kind and factors.
        num_experts: experts E of the layer.
        top_k: choices K per token.
    """

    config: CapacityConfig
    num_experts: int
    top_k: int

    def limit(self, length: int, training: bool) -> int | None:
        """Return the most assignments that an expert takes from one sequence of ``length`` tokens, or None.

        ceil(factor · S · K / E), at least 1: the expert capacity of GShard (arXiv 2006.16668) with one sequence as its
        group. A group that is a sequence, not a rank's batch, gives the same drops on every layout.
        """
        config = self.config
        if isinstance(config, DroplessConfig):
            return None
        if isinstance(config, FactorCapacityConfig):
            factor = config.factor if training else config.eval_factor
            return None if factor is None else max(1, math.ceil(factor * length * self.top_k / self.num_experts))
        assert_never(config)

    def plan(self, routing: Routing, valid_BS: Tensor | None, length: int, training: bool) -> Plan:
        """Decide who is kept.

        Args:
            routing: the choices of T = B · S tokens.
            valid_BS: [B, S] bool, False for padding, which takes no room; None when all tokens are valid.
            length: positions S of a sequence.
            training: whether the limits of training hold, or those of evaluation.
        """
        limit = self.limit(length, training)
        kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
        if valid_BS is not None:
            kept_TK &= valid_BS.reshape(-1, 1)
        if limit is not None:
            kept_TK &= queue_positions(routing.experts_TK, kept_TK, length, self.num_experts) < limit
        return Plan(routing.experts_TK, routing.weights_TK, kept_TK, all_kept=limit is None and valid_BS is None)


def queue_positions(experts_TK: Tensor, wanted_TK: Tensor, length: int, num_experts: int) -> Tensor:
    """Return each assignment's place [T, K] in the queue of its expert within its sequence, from 0.

    The queue is ordered by token, then by choice: whether a token is dropped depends on earlier tokens only, so that no
    future leaks into a causal model (with first choices before all second ones, as in GShard, it would). What is not
    wanted stands in no queue. One sort, no table of experts x tokens.
    """
    num_tokens, num_choices = experts_TK.shape
    sequence_T1 = torch.arange(num_tokens, device=experts_TK.device).unsqueeze(1) // length
    num_queues = (num_tokens // length) * num_experts
    queue_A = torch.where(wanted_TK, sequence_T1 * num_experts + experts_TK, num_queues).flatten()
    order_A = torch.argsort(queue_A, stable=True)
    lengths = torch.bincount(queue_A, minlength=num_queues + 1)
    starts = torch.cumsum(lengths, dim=0) - lengths
    positions_A = torch.empty_like(queue_A)
    positions_A[order_A] = torch.arange(queue_A.numel(), device=queue_A.device) - starts[queue_A[order_A]]
    return positions_A.view(num_tokens, num_choices)
