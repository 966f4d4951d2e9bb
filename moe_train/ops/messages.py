"""Sums of weighted messages between the experts of a token."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_messages_one_by_one(strength_TEE: Tensor, h_TED: Tensor) -> Tensor:
    """Return m_i = Σ_j strength_ij · h_j, edge by edge: the slow obvious reference of the two below.

    Args:
        strength_TEE: [T, E, E] weight of the message to expert i (row) from expert j (column).
        h_TED: [T, E, D] what the experts hold.

    Returns:
        [T, E, D] in the dtype of h_TED.
    """
    num_experts = h_TED.shape[1]
    received = []
    for i in range(num_experts):
        m_TD = torch.zeros_like(h_TED[:, i])
        for j in range(num_experts):
            m_TD = m_TD + strength_TEE[:, i, j, None].to(h_TED.dtype) * h_TED[:, j]
        received.append(m_TD)
    return torch.stack(received, dim=1)


def sum_messages(strength_TEE: Tensor, h_TED: Tensor) -> Tensor:
    """Return the same sums by one product of matrices per token: 2 · E² · D operations, whatever edges there are."""
    return strength_TEE.to(h_TED.dtype) @ h_TED


def sum_chosen_messages(strength_TEE: Tensor, h_TED: Tensor, sources_EM: Tensor) -> Tensor:
    """Return the same sums over some sources of each expert only: 2 · E · M · D operations, and M gathered copies of h.

    Args:
        strength_TEE: [T, E, E] as above; only the entries of the sources are looked at.
        h_TED: [T, E, D] as above.
        sources_EM: [E, M] int64, M different sources of each expert.
    """
    m_TED = torch.zeros_like(h_TED)
    for sources_E in sources_EM.unbind(dim=1):
        places_TE1 = sources_E.view(1, -1, 1).expand(len(h_TED), -1, -1)
        weight_TE1 = strength_TEE.gather(2, places_TE1).to(h_TED.dtype)
        m_TED = m_TED + weight_TE1 * h_TED.index_select(1, sources_E)
    return m_TED
