"""Routers that score each expert by itself and take the K best: top-k, Switch, sigmoid, group-limited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.routing import GroupLimitedRouterConfig, LearnedRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.roles import Role
from moe_train.moe.routers.linear import LinearRouter
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k


@dataclass(frozen=True)
class GroupLimit:
    """Experts may come from a token's best groups only.

    Attributes:
        groups: groups of consecutive experts.
        top_groups: groups in which a token may choose.
        members: experts whose scores make a group's score: 1 is the maximum (DeepSeek-V2, 2.1.2), 2 the sum of the two
            best (DeepSeek-V3, 2.1.2).
    """

    groups: int
    top_groups: int
    members: int

    @staticmethod
    def of(config: GroupLimitedRouterConfig) -> GroupLimit:
        """Return the limit of a configuration."""
        return GroupLimit(config.groups, config.top_groups, 1 if config.group_score == "max" else 2)

    def apply(self, ranking_TE: Tensor) -> Tensor:
        """Return the ranking with -inf for experts of other groups: 0 would win against a negative score."""
        num_tokens, num_experts = ranking_TE.shape
        grouped = ranking_TE.view(num_tokens, self.groups, num_experts // self.groups)
        group_scores = grouped.topk(self.members, dim=2).values.sum(dim=2)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(1, top_k(group_scores, self.top_groups), True)
        return grouped.masked_fill(~allowed.unsqueeze(2), float("-inf")).view_as(ranking_TE)


@dataclass(frozen=True)
class Scoring:
    """How experts are scored and chosen scores become weights.

    Attributes:
        sigmoid: scores by sigmoid instead of softmax.
        normalised: chosen scores are divided by their sum; else they are the weights.
        limit: groups from which experts may come, or None.
        logit_bias: whether a learned bias is added to the logits.
    """

    sigmoid: bool
    normalised: bool
    limit: GroupLimit | None = None
    logit_bias: bool = False


class ScoreRouter(LinearRouter):
    """scores = softmax or sigmoid of the logits; the K best by scores + bias; weights from the scores alone.

    With softmax, not normalised: Switch Transformer (arXiv 2101.03961, eq. 2), OLMoE, DeepSeekMoE (arXiv
    2401.06066, eq. 9 to 11). With softmax, normalised: Qwen3, and Mixtral (arXiv 2401.04088, section 2.1), whose
    softmax over the chosen logits is the same. Sigmoid scores, normalised, with bias and groups: DeepSeek-V3 (arXiv
    2412.19437, eq. 12 to 16).

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token.
        config: scale, jitter and expert dropout.
        role: of the weight.
        biased: whether loss-free balancing moves a bias on the choice.
        scoring: the rest.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        config: LearnedRouterConfig,
        role: Role,
        biased: bool,
        scoring: Scoring,
    ) -> None:
        super().__init__(dim, num_experts, top_k, config, role, biased, scoring.logit_bias)
        self.scoring = scoring

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        scores_TE = logits_TE.sigmoid() if self.scoring.sigmoid else logits_TE.softmax(dim=1)
        ranking_TE = self.offered(self.ranking(logits_TE, scores_TE), context)
        experts_TK = decide(lambda: top_k(ranking_TE, self.top_k))
        weigh = self.weigher(logits_TE, scores_TE)
        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=shares(scores_TE) if self.scoring.sigmoid else scores_TE,
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
            # With a bias, f counts what the scores alone would choose (DeepSeek-V3, eq. 18): the loss is about these.
            counted_TM=None if self.bias_E is None else decide(lambda: top_k(logits_TE, self.top_k)),
        )

    def ranking(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """Return what the choice is made by, [T, E]."""
        if self.scoring.limit is None and self.bias_E is None:
            return logits_TE  # the order of the scores, without the ties that their rounding makes
        ranking_TE = scores_TE.detach()
        if self.bias_E is not None:
            ranking_TE = ranking_TE + self.bias_E.to(ranking_TE.dtype)
        return ranking_TE if self.scoring.limit is None else self.scoring.limit.apply(ranking_TE)

    def weigher(self, logits_TE: Tensor, scores_TE: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from chosen experts [T, K] to their weights."""

        def weigh(experts_TK: Tensor) -> Tensor:
            if self.scoring.normalised and not self.scoring.sigmoid:
                # The quotient of softmax scores, but finite when dropout or bias chooses scores that all vanish.
                return self.scale * logits_TE.gather(1, experts_TK).softmax(dim=1)
            chosen_TK = scores_TE.gather(1, experts_TK)
            if self.scoring.normalised:
                chosen_TK = shares(chosen_TK)
            return self.scale * chosen_TK

        return weigh


def shares(scores_TM: Tensor) -> Tensor:
    """Return sigmoid scores [T, M] over their sum, which may vanish: 1e-20 as in DeepSeek-V3's published code."""
    return scores_TM / (scores_TM.sum(dim=1, keepdim=True) + 1e-20)
