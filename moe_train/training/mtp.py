"""The loss of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, eq. 24 and 25)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.models.transformer import ModelOutput
from moe_train.moe.context import ahead
from moe_train.ops.loss import IGNORE, cross_entropy_sum


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


def mtp_loss(output: ModelOutput, labels_BS: Tensor, boundary_id: int | None) -> MTPLoss:
    """Sum the cross-entropy of all modules.

    As the main loss, the sum is divided by the valid tokens of the step, not by the fewer that a module can predict
    (eq. 24).

    Args:
        output: of the model in training.
        labels_BS: [B, S] int64, the next tokens; IGNORE where there is none.
        boundary_id: token that ends a document, see `labels_ahead`.
    """
    precise = torch.promote_types(output.logits_BSV.dtype, torch.float32)
    loss_sum = labels_BS.new_zeros((), dtype=precise)
    targets = labels_BS.new_zeros(())
    for k, logits_BSV in enumerate(output.mtp_logits):
        later_BS = labels_ahead(labels_BS, k + 1, boundary_id)
        loss_sum = loss_sum + cross_entropy_sum(logits_BSV.flatten(0, 1), later_BS.flatten())
        targets = targets + (later_BS != IGNORE).sum()
    return MTPLoss(loss_sum, targets, len(output.mtp_logits))


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
