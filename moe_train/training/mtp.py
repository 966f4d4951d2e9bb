"""The loss of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, eq. 24 and 25)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.models.transformer import ModelLosses
from moe_train.moe.context import ahead
from moe_train.ops.loss import IGNORE


@dataclass(frozen=True)
class MTPLoss:
    """Sums of one forward pass over the modules of multi-token prediction.

    Attributes:
        loss_sum: scalar, summed cross-entropy of all modules, in nats.
        targets: scalar int64, tokens that they predicted together.
        modules: how many there are.
    """

    loss_sum: Tensor
    targets: Tensor
    modules: int

    @property
    def mean_sum(self) -> Tensor:
        """The part of the objective that is weighted (eq. 25): the sum, mean over the modules."""
        return self.loss_sum / max(1, self.modules)

    @property
    def sums(self) -> Tensor:
        """[2] fp64 without gradient: loss_sum and targets, to be added up."""
        return torch.stack([self.loss_sum.detach().to(torch.float64), self.targets.to(torch.float64)])


def mtp_loss(losses: ModelLosses, labels: Sequence[Tensor]) -> MTPLoss:
    """Add up the cross-entropy of all modules.

    As the main loss, the sum is divided by the valid tokens of the step, not by the fewer that a module can predict
    (eq. 24).

    Args:
        losses: of the model in training.
        labels: of each module [B, S] int64, as `mtp_labels` made them.
    """
    own, *ahead = losses.loss_sums
    loss_sum, targets = own.new_zeros(()), torch.zeros((), dtype=torch.int64, device=own.device)
    for module_sum, labels_BS in zip(ahead, labels, strict=True):
        loss_sum = loss_sum + module_sum
        targets = targets + (labels_BS != IGNORE).sum()
    return MTPLoss(loss_sum, targets, len(ahead))


def mtp_labels(labels_BS: Tensor, modules: int, boundary_id: int | None) -> list[Tensor]:
    """Return the labels [B, S] of each module.

    Args:
        labels_BS: [B, S] int64, the next tokens; IGNORE where there is none.
        modules: how many there are.
        boundary_id: token that ends a document, see `labels_ahead`.
    """
    return [labels_ahead(labels_BS, k + 1, boundary_id) for k in range(modules)]


def labels_ahead(labels_BS: Tensor, steps: int, boundary_id: int | None) -> Tensor:
    """Return the labels ``steps`` positions later, IGNORE where none is left or a document ends in between.

    A module that is told the end of a document cannot know how the next one goes on.

    Args:
        labels_BS: [B, S] int64, the next tokens; IGNORE where there is none.
        steps: at least 1.
        boundary_id: token that ends a document; None: none does.
    """
    later_BS = ahead(labels_BS - IGNORE, steps) + IGNORE  # what moves in from the right is IGNORE
    if boundary_id is None:
        return later_BS
    for step in range(steps):
        later_BS = later_BS.masked_fill(ahead(labels_BS, step) == boundary_id, IGNORE)
    return later_BS
