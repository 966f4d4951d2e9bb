"""Cross-entropy as a sum over tokens: the only form that is exact when ranks hold different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of a position that has no target (padding)."""


def cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Return the summed negative log-likelihood in nats, a scalar of at least fp32.

    Args:
        logits_TV: [T, V] logits; any dtype.
        labels_T: [T] int64 targets; IGNORE counts for nothing.
    """
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="sum")


def cross_entropy_sum_reference(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Do the same, token by token."""
    total = logits_TV.new_zeros((), dtype=torch.promote_types(logits_TV.dtype, torch.float32))
    for logits_V, label in zip(logits_TV.to(total.dtype), labels_T.tolist(), strict=True):
        if label != IGNORE:
            total = total + logits_V.logsumexp(dim=0) - logits_V[label]
    return total
