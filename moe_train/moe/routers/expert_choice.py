"""Expert choice: experts take tokens (Zhou et al. 2022, arXiv 2202.09368), and a causal way to do without."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.routing import ExpertChoiceRouterConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.foresight import Foresighted
from moe_train.moe.roles import Role
from moe_train.moe.routers.linear import LinearRouter
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide


class ExpertChoiceRouter(LinearRouter, Foresighted):
    """softmax over experts, then each expert takes its best k = n·K/E of a sequence's n valid tokens (section 3.2).

    Load is even by construction; a token gets 0 to E experts, K on average, with its scores as weights. Whether a token
    is taken depends on later ones. Where these may not decide (evaluation and generation, but for `looking_ahead`) an
    expert takes every token whose score exceeds its threshold: a running mean, over the steps of the training, of the
    score of the last token that it took of a sequence. A token may then get no expert, and load is even only as far as
    texts are alike.

    Args:
        dim: width D of a token.
        num_experts: number E of experts over all ranks.
        top_k: choices K per token, on average.
        config: scale, jitter, expert dropout, and how slowly thresholds move.
        role: of the weight.
    """

    threshold_E: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, config: ExpertChoiceRouterConfig, role: Role) -> None:
        super().__init__(dim, num_experts, top_k, config, role)
        self.decay = config.decay
        # Zero: not learnt yet. Saved with the model, because the choice depends on it.
        self.register_buffer("threshold_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype; every expert has a column, of which only the chosen entries count."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        scores_TE = logits_TE.softmax(dim=1)
        ranking_TE = self.offered(scores_TE, context).masked_fill(~context.valid_T.unsqueeze(1), float("-inf"))
        experts_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(ranking_TE)
        take = self.taken if self.knows_later_tokens else self.above
        chosen_TE = decide(lambda: take(ranking_TE, context))

        def weigh(experts_TK: Tensor) -> Tensor:
            return self.scale * scores_TE.gather(1, experts_TK)

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=scores_TE,
            ranking_TE=ranking_TE,
            experts_TK=experts_TE,
            weights_TK=weigh(experts_TE),
            weigh=weigh,
            chosen_TK=chosen_TE,
            last_BE=last_scores(ranking_TE, chosen_TE, context) if self.training else None,
        )

    def taken(self, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return [T, E] bool: which tokens each expert takes, among equals the earliest."""
        ranking_BSE = ranking_TE.view(-1, context.length, self.num_experts)
        lengths_B = context.valid_T.view(-1, context.length).sum(dim=1)
        limits_B = (lengths_B * self.top_k // self.num_experts).clamp(min=1)
        # As fp32 numbers: in fp64 the last digits of equal tokens depend on the layout, and would decide.
        order_BSE = ranking_BSE.to(torch.float32).argsort(dim=1, descending=True, stable=True)
        places_BSE = order_BSE.argsort(dim=1)
        taken_BSE = (places_BSE < limits_B.view(-1, 1, 1)) & ranking_BSE.isfinite()
        return taken_BSE.view_as(ranking_TE)

    def above(self, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return [T, E] bool: the scores above their expert's threshold; no token knows of another.

        A threshold that no step has moved yet stands for 1/E, the score of a router that prefers nobody.
        """
        threshold_E = torch.where(self.threshold_E > 0, self.threshold_E, 1.0 / self.num_experts)
        return ranking_TE > threshold_E.to(ranking_TE.dtype)

    @torch.no_grad()
    def move_threshold(self, sum_E: Tensor, sequences_E: Tensor) -> None:
        """Move the thresholds after an optimizer step: they start with the first step's mean, then decay to later ones.

        Args:
            sum_E: [E] fp64, scores of the last tokens taken, over all sequences of the step.
            sequences_E: [E], sequences of which the expert took a token; where there is none, nothing moves.
        """
        mean_E = (sum_E / sequences_E.clamp(min=1)).to(self.threshold_E.dtype)
        moved_E = torch.where(self.threshold_E > 0, torch.lerp(mean_E, self.threshold_E, self.decay), mean_E)
        self.threshold_E.copy_(torch.where(sequences_E > 0, moved_E, self.threshold_E))


def last_scores(ranking_TE: Tensor, taken_TE: Tensor, context: RoutingContext) -> Tensor:
    """Return [B, E]: the least score of a token that each expert took of each sequence; inf where it took none."""
    return ranking_TE.masked_fill(~taken_TE, float("inf")).view(-1, context.length, ranking_TE.shape[1]).amin(dim=1)
