"""Classifiers by vote: the majority's class, against each classifier by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VoteScores:
    """How often each answer is right.

    Attributes:
        agents: accuracy of each agent, by name.
        vote: accuracy of the majority.
        mean: accuracy of the mean probability, for comparison.
        unanimous: share of the texts on which all agents agree: what no vote can change.
        texts: number of texts.
    """

    agents: dict[str, float]
    vote: float
    mean: float
    unanimous: float
    texts: int


def majority(probabilities_PNC: Tensor) -> Tensor:
    """Return the class that most agents choose, [N] int64.

    A tie goes to the tied class with the largest mean probability, and if that is a tie, too, to the first of them.

    Args:
        probabilities_PNC: [P, N, C] class probabilities of each agent, at least one; any floating dtype.
    """
    classes = probabilities_PNC.shape[-1]
    choices_PN = probabilities_PNC.argmax(dim=-1)
    votes_NC = torch.nn.functional.one_hot(choices_PN, classes).sum(dim=0)
    is_tied_NC = votes_NC == votes_NC.amax(dim=-1, keepdim=True)
    mean_NC = probabilities_PNC.to(torch.float64).mean(dim=0)
    return mean_NC.masked_fill(~is_tied_NC, -1.0).argmax(dim=-1)


def vote_scores(names: Sequence[str], probabilities_PNC: Tensor, labels_N: Tensor) -> VoteScores:
    """Return the accuracy of each agent, of their vote, and of their mean.

    Args:
        names: of the agents.
        probabilities_PNC: [P, N, C] class probabilities, by agent.
        labels_N: [N] int64 true classes; at least one.
    """
    assert len(labels_N) > 0, "there must be a text to classify"
    choices_PN = probabilities_PNC.argmax(dim=-1)

    def share(is_so_N: Tensor) -> float:
        return float(is_so_N.to(torch.float64).mean())

    return VoteScores(
        agents={name: share(choices_N == labels_N) for name, choices_N in zip(names, choices_PN, strict=True)},
        vote=share(majority(probabilities_PNC) == labels_N),
        mean=share(probabilities_PNC.to(torch.float64).mean(dim=0).argmax(dim=-1) == labels_N),
        unanimous=share((choices_PN == choices_PN[0]).all(dim=0)),
        texts=len(labels_N),
    )
