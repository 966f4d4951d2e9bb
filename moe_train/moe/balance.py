"""Losses that keep the experts' load even, in a form that is exact on every layout.

A layer's forward returns sums over its tokens (`RoutingRecord`); the step adds up the counts of all ranks and
micro-batches and only then forms the loss. Counts carry no gradient, and the loss is linear in what carries one, so
that the sum of all ranks' and micro-batches' losses is the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.schema import BalanceConfig
from moe_train.moe.capacity import Plan
from moe_train.moe.router import Routing


@dataclass(frozen=True)
class RoutingRecord:
    """What one layer's router did with the valid tokens of one forward pass; padding counts nowhere.

    Attributes:
        counts_E: [E] int64, assignments per expert, before any is dropped.
        dropped: scalar int64, assignments that were not kept.
        probability_sum_E: [E] sum over tokens of the router's probabilities; differentiable.
        sequence_balance_sum: scalar, sum over sequences of their own E·Σ f·P times their tokens; differentiable.
        z_sum: scalar, sum over tokens of logsumexp(logits)²; differentiable.
        entropy_sum: scalar, sum over tokens of the entropy of the router's probabilities, in nats.
    """

    counts_E: Tensor
    dropped: Tensor
    probability_sum_E: Tensor
    sequence_balance_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor

    @staticmethod
    def of(routing: Routing, plan: Plan, valid_BS: Tensor | None, length: int) -> RoutingRecord:
        """Sum up one forward pass over T = B · S tokens."""
        num_tokens, num_experts = routing.logits_TE.shape
        if valid_BS is None:
            valid_T = torch.ones(num_tokens, dtype=torch.bool, device=routing.logits_TE.device)
        else:
            valid_T = valid_BS.flatten()
        counts_BE = count_choices(routing.experts_TK, valid_T, length, num_experts)
        probabilities_TE = routing.probabilities_TE * valid_T.unsqueeze(1)
        probability_sums_BE = probabilities_TE.view(-1, length, num_experts).sum(dim=1)
        kept = plan.kept_TK.sum()  # padding is never kept
        log_probabilities_TE = routing.logits_TE.detach().log_softmax(dim=1)
        return RoutingRecord(
            counts_E=counts_BE.sum(dim=0),
            dropped=counts_BE.sum() - kept,
            probability_sum_E=probability_sums_BE.sum(dim=0),
            sequence_balance_sum=balance_sum(counts_BE, probability_sums_BE).sum(),
            z_sum=(routing.logits_TE.logsumexp(dim=1).square() * valid_T).sum(),
            entropy_sum=-(probabilities_TE.detach() * log_probabilities_TE).sum(),
        )


def count_choices(experts_TK: Tensor, valid_T: Tensor, length: int, num_experts: int) -> Tensor:
    """Return [B, E] int64: how often the valid tokens of each sequence chose each expert."""
    sequence_T = torch.arange(experts_TK.shape[0], device=experts_TK.device) // length
    num_cells = (experts_TK.shape[0] // length) * num_experts
    cells_TK = torch.where(valid_T.unsqueeze(1), sequence_T.unsqueeze(1) * num_experts + experts_TK, num_cells)
    return torch.bincount(cells_TK.flatten(), minlength=num_cells + 1)[:num_cells].view(-1, num_experts)


def balance_sum(counts_E: Tensor, probability_sum_E: Tensor) -> Tensor:
    """Return E·Σ_e f_e·(Σ_t p_te): tokens times the load-balance loss (Switch Transformer, eq. 4 to 6, for any K).

    f_e is the share of assignments, Σ f = 1, so that the loss is exactly 1.0 when probabilities are even, for every K.
    No gradient flows through f.

    Args:
        counts_E: [..., E] assignments of all the tokens over which f is taken.
        probability_sum_E: [..., E] sums of probabilities, possibly of only a part of these tokens.
    """
    num_experts = counts_E.shape[-1]
    share_E = counts_E.to(probability_sum_E.dtype) / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)
    return num_experts * (share_E * probability_sum_E).sum(dim=-1)


@dataclass(frozen=True)
class Balance:
    """The balance losses of a layer.

    Attributes:
        config: which, with their weights.
    """

    config: BalanceConfig

    @property
    def needs_global_counts(self) -> bool:
        """Whether the loss takes the counts of the whole optimizer step."""
        return self.config.aux is not None and self.config.aux.scope == "global"

    def loss_sum(self, record: RoutingRecord, global_counts_E: Tensor) -> Tensor:
        """Return this record's share of the weighted losses: a sum over tokens, to be divided by the global number.

        Args:
            record: the sums of one forward pass on this rank.
            global_counts_E: [E] assignments of the whole optimizer step.
        """
        loss = record.z_sum.new_zeros(())
        if self.config.aux is not None:
            loss = loss + self.config.aux.coef * self.aux_sum(record, global_counts_E)
        if self.config.z_loss is not None:
            loss = loss + self.config.z_loss.coef * record.z_sum
        return loss

    def aux_sum(self, record: RoutingRecord, global_counts_E: Tensor) -> Tensor:
        """Return tokens times the unweighted load-balance loss in the configured scope (global when there is none)."""
        if self.config.aux is not None and self.config.aux.scope == "sequence":
            return record.sequence_balance_sum
        return balance_sum(global_counts_E, record.probability_sum_E)
