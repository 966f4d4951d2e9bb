"""Language models mixed token by token: the perplexity of their mixture against each, on held-out text.

A mixture of agents passes text, not probabilities, so that it has no perplexity of its own. What can be measured of the
project's small models is whether their next-token distributions complete each other:

- linear, ``p(x) = sum_k w_k p_k(x)`` with equal weights (the linear opinion pool: Stone 1961);
- geometric, ``p(x) = prod_k p_k(x)^(1/P) / Z`` (the logarithmic pool; a product of experts, Hinton 2002, tempered);
- fitted, linear with the weights that are best on the first part of the tokens. Every figure is of the other part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moe_train.data.loader import Batch
from moe_train.ops.loss import IGNORE

Score: TypeAlias = Callable[[Batch], Tensor]
"""Returns a model's logits of the next token at each position of a batch: [B, S, V], any floating dtype."""
FIT_ITERATIONS = 200
"""Of expectation-maximisation; each raises the likelihood, and for a few models it has long converged."""


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of the true tokens, in nats.

    Attributes:
        agents_PT: of each agent, [P, T] fp64.
        geometric_T: of the geometric mixture with equal weights, [T] fp64.
    """

    agents_PT: Tensor
    geometric_T: Tensor


@dataclass(frozen=True)
class MixtureScores:
    """Loss in nats per token of each agent and each mixture, on the same tokens.

    Attributes:
        losses: by name of the agent.
        mixed: by rule: ``linear``, ``geometric`` and, where weights were fitted, ``fitted``.
        weights: fitted, by name of the agent; empty when none were.
        tokens: that the losses are of.
        fitted_tokens: that the weights were fitted on.
    """

    losses: dict[str, float]
    mixed: dict[str, float]
    weights: dict[str, float]
    tokens: int
    fitted_tokens: int

    def figures(self, num_tokens: int, num_bytes: int) -> dict[str, Any]:
        """Return loss, perplexity and bits per byte by agent and by rule, and what they are of.

        Args:
            num_tokens: of the whole held-out text.
            num_bytes: of the same text.
        """
        bits_per_nat = num_tokens / num_bytes / math.log(2)

        def by_name(losses: dict[str, float]) -> dict[str, dict[str, float]]:
            return {
                name: {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": loss * bits_per_nat}
                for name, loss in losses.items()
            }

        return {
            "agents": by_name(self.losses),
            "mixtures": by_name(self.mixed),
            "weights": self.weights,
            "tokens": self.tokens,
            "fitted_tokens": self.fitted_tokens,
        }


@torch.no_grad()
def score_tokens(scores: Sequence[Score], batches: Iterable[Batch], vocab_size: int) -> TokenScores:
    """Return the log-probabilities of the true tokens. One batch's distributions are in memory at one time.

    Args:
        scores: of each agent; all with one tokenizer.
        batches: held-out text; positions whose label is IGNORE are left out.
        vocab_size: of the tokenizer. Models may have more rows, which stand for no token.
    """
    parts = [score_batch(scores, batch, vocab_size) for batch in batches]
    return TokenScores(
        torch.cat([part.agents_PT for part in parts], dim=1), torch.cat([part.geometric_T for part in parts])
    )


def score_batch(scores: Sequence[Score], batch: Batch, vocab_size: int) -> TokenScores:
    """Return the same of one batch."""
    labels_BS = batch.labels_BS.cpu()
    is_valid_BS = labels_BS != IGNORE
    labels_T = labels_BS[is_valid_BS]
    rows: list[Tensor] = []
    mean_TV = torch.zeros(len(labels_T), vocab_size, dtype=torch.float64)
    for score in scores:
        logs_TV = score(batch).cpu()[is_valid_BS].to(torch.float64).log_softmax(dim=-1)
        rows.append(logs_TV.gather(1, labels_T[:, None])[:, 0])
        mean_TV.add_(logs_TV[:, :vocab_size], alpha=1 / len(scores))
    geometric_T = mean_TV.gather(1, labels_T[:, None])[:, 0] - mean_TV.logsumexp(dim=-1)
    return TokenScores(torch.stack(rows), geometric_T)


def mixture_scores(names: Sequence[str], tokens: TokenScores, fit_fraction: float) -> MixtureScores:
    """Return the losses of agents and mixtures on the tokens that no weight was fitted on.

    Args:
        names: of the agents, in the order of the scores.
        tokens: their log-probabilities, in the order of the text.
        fit_fraction: share of the tokens, from the beginning, for fitting; 0: nothing is fitted.
    """
    total = tokens.agents_PT.shape[1]
    fitted = int(total * fit_fraction)
    assert fitted < total, "there must be a token to score"
    rest_PT = tokens.agents_PT[:, fitted:]
    equal_P = torch.full((len(names),), 1.0 / len(names), dtype=torch.float64)
    mixed = {"linear": linear_loss(rest_PT, equal_P), "geometric": -float(tokens.geometric_T[fitted:].mean())}
    weights: dict[str, float] = {}
    if fitted > 0:
        weights_P = fit_weights(tokens.agents_PT[:, :fitted])
        mixed["fitted"] = linear_loss(rest_PT, weights_P)
        weights = dict(zip(names, weights_P.tolist(), strict=True))
    losses = {name: -float(logs_T.mean()) for name, logs_T in zip(names, rest_PT, strict=True)}
    return MixtureScores(losses, mixed, weights, total - fitted, fitted)


def linear_loss(logs_PT: Tensor, weights_P: Tensor) -> float:
    """Return the mean of ``-log sum_k w_k p_k`` in nats per token.

    Args:
        logs_PT: [P, T] log-probabilities.
        weights_P: [P], sum 1; zeros are fine.
    """
    return -float((logs_PT + weights_P.log()[:, None]).logsumexp(dim=0).mean())


def fit_weights(logs_PT: Tensor) -> Tensor:
    """Return the weights [P] fp64 of the linear mixture with the largest likelihood.

    Expectation-maximisation for mixture weights (Dempster et al. 1977, section 4.3): a weight becomes the mean share
    that its model has in the probability of the tokens. The likelihood is concave in the weights: there is one summit.

    Args:
        logs_PT: [P, T] log-probabilities of the tokens.
    """
    weights_P = torch.full((logs_PT.shape[0],), 1.0 / logs_PT.shape[0], dtype=torch.float64)
    for _ in range(FIT_ITERATIONS):
        weights_P = (logs_PT + weights_P.log()[:, None]).softmax(dim=0).mean(dim=1)
    return weights_P
