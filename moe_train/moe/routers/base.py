"""BASE layers: routing as a balanced assignment (Lewis et al. 2021, arXiv 2103.16716)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_train.moe.context import RoutingContext
from moe_train.moe.queues import places
from moe_train.moe.routers.linear import LinearRouter
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide
from moe_train.ops.topk import top_k

PRECISION = 1.0 / 256
"""Least rise of a price in the auction, relative to the range of the scores: the total is this close to the best."""


class BaseRouter(LinearRouter):
    """In training every expert gets equally many of all ranks' tokens, so that the sum of their logits is largest.

    y = x + sigmoid(z) · expert(x) (eq. 2). In evaluation each token goes to its best expert. No balance loss is needed.
    """

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route tokens [T, D] of any dtype. In training every rank solves the assignment of the whole batch."""
        logits_TE = self.logits(self.precise_inputs(x_TD, context))
        ranking_TE = self.offered(logits_TE, context)
        experts_TK = decide(lambda: self.assign(ranking_TE, context) if self.training else top_k(ranking_TE, 1))

        def weigh(experts_TK: Tensor) -> Tensor:
            return self.scale * logits_TE.gather(1, experts_TK).sigmoid()

        return Routing(
            logits_TE=logits_TE,
            probabilities_TE=logits_TE.softmax(dim=1),
            ranking_TE=ranking_TE,
            experts_TK=experts_TK,
            weights_TK=weigh(experts_TK),
            weigh=weigh,
        )

    def assign(self, ranking_TE: Tensor, context: RoutingContext) -> Tensor:
        """Return this rank's part [T, 1] of the assignment of all ranks' valid tokens; padding goes to expert 0."""
        # As fp32 numbers: in fp64 the last digits of equal tokens depend on the layout, and would decide.
        scores_NE, first = context.peers.gather(ranking_TE.to(torch.float32))
        valid_N, _ = context.peers.gather(context.valid_T)
        experts_N = torch.zeros_like(valid_N, dtype=torch.int64)
        experts_N[valid_N] = balanced_assignment(scores_NE[valid_N])
        return experts_N[first : first + ranking_TE.shape[0]].unsqueeze(1)


def balanced_assignment(scores_NE: Tensor) -> Tensor:
    """Return an expert [N] for each row, at most ceil(N / E) rows for each, with the sum of scores near the largest.

    An auction (Bertsekas 1988, with experts as ceil(N / E) equal objects): every row without an expert bids for its
    best one at present prices, an expert keeps its highest bidders, and a full one costs what the lowest of these paid.
    The total is within N · PRECISION · range of the optimum. Waits for the device once a round.

    Args:
        scores_NE: [N, E]; -inf counts as the lowest finite score less the range of them all.
    """
    num_rows, num_experts = scores_NE.shape
    if num_rows == 0 or num_experts == 1:
        return torch.zeros(num_rows, dtype=torch.int64, device=scores_NE.device)
    room = math.ceil(num_rows / num_experts)
    finite_NE = torch.where(scores_NE.isfinite(), scores_NE, 0.0)
    spread = (finite_NE.max() - finite_NE.min()).clamp(min=1e-6)
    values_NE = torch.where(scores_NE.isfinite(), scores_NE, finite_NE.min() - spread)
    prices_E = torch.zeros_like(values_NE[0])
    experts_N = torch.full((num_rows,), num_experts, device=scores_NE.device)
    bids_N = torch.zeros_like(values_NE[:, 0])
    while bool((experts_N == num_experts).any()):
        seeking_N = experts_N == num_experts
        profits_NE = values_NE - prices_E
        best_N = top_k(profits_NE, 1).squeeze(1)
        first_N, second_N = profits_NE.topk(2, dim=1).values.unbind(dim=1)
        offers_N = prices_E[best_N] + first_N - second_N + PRECISION * spread
        experts_N = torch.where(seeking_N, best_N, experts_N)
        bids_N = torch.where(seeking_N, offers_N, bids_N)
        places_N = places(experts_N.unsqueeze(1), num_experts, bids_N.unsqueeze(1)).squeeze(1)
        lowest_N = places_N == room - 1  # the last bidder that a full expert keeps sets its price
        prices_E[experts_N[lowest_N]] = bids_N[lowest_N]
        experts_N = torch.where(places_N < room, experts_N, num_experts)
    return experts_N
