"""How different the experts of a layer are, and what they tell each other: sums, figures and a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.moe.graph.coupling import Coupled
from moe_train.moe.graph.similarity import cosines
from moe_train.moe.record import LayerRecord, LossPerToken


@dataclass(frozen=True)
class GraphRecord(LayerRecord):
    """Sums over the valid tokens of a dense graph-coupled layer. M is its number of graph layers with messages.

    What an expert adds to a token is its output, for a whole block less the common input.

    Attributes:
        cosines_EE: [E, E] fp64, cosine between what two experts add.
        strengths_MEE: [M, E, E] fp64, weight of the message to expert i (row) from expert j (column).
        message_norms_M: [M] fp64, norms of the received messages, mean over the experts.
        sent_norms_M: [M] fp64, norms of what the experts sent, mean over the experts.
    """

    cosines_EE: Tensor
    strengths_MEE: Tensor
    message_norms_M: Tensor
    sent_norms_M: Tensor

    @staticmethod
    def of(added_TED: Tensor, coupled: Coupled, valid_T: Tensor, loss: LossPerToken) -> GraphRecord:
        """Sum up one forward pass.

        Args:
            added_TED: [T, E, D] what each expert adds to each token.
            coupled: what the coupling made of the experts' results.
            valid_T: [T] bool, False for padding.
            loss: the layer's `diversity`, which decides whether the cosines have a gradient.
        """
        valid_T = valid_T.to(torch.float64)
        with torch.set_grad_enabled(torch.is_grad_enabled() and loss.coef > 0.0):
            cosines_TEE = cosines(added_TED)
            squares = torch.einsum("tij,t->ij", squared_off_diagonal(cosines_TEE), valid_T).sum().view(1)
        with torch.no_grad():
            strengths = [over_tokens(told.strength_TEE, valid_T) for told in coupled.messages]
            received = [mean_norm(told.received_TED, valid_T) for told in coupled.messages]
            sent = [mean_norm(told.sent_TED, valid_T) for told in coupled.messages]
            cosines_EE = over_tokens(cosines_TEE, valid_T)
        return GraphRecord(
            tokens=valid_T.sum().to(torch.int64),
            cosines_EE=cosines_EE,
            strengths_MEE=torch.stack(strengths) if strengths else cosines_EE.new_zeros(0, *cosines_EE.shape),
            message_norms_M=torch.stack(received) if received else cosines_EE.new_zeros(0),
            sent_norms_M=torch.stack(sent) if sent else cosines_EE.new_zeros(0),
            statistics=(squares,),
        )

    def figures(self) -> dict[str, object]:
        """Return what is written down of the layer.

        ``similarity``: mean cosine between what two experts add. ``cosines``: the same for each pair.
        ``effective_rank``: of the matrix of cosines, 1 (all alike) to E (all orthogonal). ``message_strength``: per
        graph layer the mean weight of the message to expert i (row) from expert j. ``message_norm``: per graph layer
        the mean norm of what an expert receives, relative to that of what it sends.
        """
        tokens = self.tokens.clamp(min=1)
        mean_EE = self.cosines_EE / tokens
        pairs = max(1, mean_EE.numel() - len(mean_EE))
        return {
            "similarity": float(mean_EE.sum() - mean_EE.trace()) / pairs,
            "cosines": mean_EE.tolist(),
            "effective_rank": effective_rank(mean_EE),
            "message_strength": (self.strengths_MEE / tokens).tolist(),
            "message_norm": (self.message_norms_M / self.sent_norms_M.clamp(min=1e-30)).tolist(),
        }


def diversity(coef: float) -> LossPerToken:
    """Return the loss of a layer: mean squared cosine between what two experts add, 0 (orthogonal) to 1 (alike)."""
    return LossPerToken("orthogonality_loss", coef)


def squared_off_diagonal(cosines_TEE: Tensor) -> Tensor:
    """Return [T, E, E] whose sum over a token is the mean of the squared cosines of its pairs of experts."""
    num_experts = cosines_TEE.shape[1]
    pairs = max(1, num_experts * (num_experts - 1))
    same_EE = torch.eye(num_experts, dtype=torch.bool, device=cosines_TEE.device)
    return cosines_TEE.masked_fill(same_EE, 0.0).square().to(torch.float64) / pairs


def over_tokens(x_TEE: Tensor, valid_T: Tensor) -> Tensor:
    """Return the sum [E, E] over the valid tokens, fp64."""
    return torch.einsum("tij,t->ij", x_TEE.to(torch.float64), valid_T)


def mean_norm(h_TED: Tensor, valid_T: Tensor) -> Tensor:
    """Return the sum over the valid tokens of the mean norm of their experts' vectors, scalar fp64."""
    norms_TE = torch.linalg.vector_norm(h_TED, dim=-1, dtype=torch.promote_types(h_TED.dtype, torch.float32))
    return torch.dot(norms_TE.mean(dim=1).to(torch.float64), valid_T)


def effective_rank(mean_EE: Tensor) -> float:
    """Return exp of the entropy of the eigenvalues' shares (Roy and Vetterli 2007) of a matrix of mean cosines."""
    eigenvalues_E = torch.linalg.eigvalsh(mean_EE).clamp(min=0.0)
    shares_E = eigenvalues_E / eigenvalues_E.sum().clamp(min=1e-30)
    return float(torch.exp(-torch.xlogy(shares_E, shares_E).sum()))
