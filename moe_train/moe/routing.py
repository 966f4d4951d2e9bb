"""What a router decides: the form in which capacity, exchange and balance losses take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The decisions for T tokens.

    Where a layer has no-op experts E counts them, too: they are the last ones.

    Attributes:
        logits_TE: [T, E] the router's raw scores, at least fp32, before noise and bias: what the z-loss takes.
        probabilities_TE: [T, E] rows sum to one: P of the balance losses, and what the entropy is of.
        ranking_TE: [T, E] what the choice was made by, larger is better, without gradient; -inf: must not be chosen.
        experts_TK: [T, K] int64, global index of each choice, best first; no expert twice in a row.
        weights_TK: [T, K] weight of each choice in the sum of expert outputs, at least fp32, differentiable.
        weigh: what gives the weights [T, K] of any experts [T, K], for choices that are changed later.
        chosen_TK: [T, K] bool, False where a column holds no choice; None: all hold one.
        declined_TK: [T, K] bool, choices that the router itself gave up, counted as dropped; None: none.
        counted_TM: [T, M] int64, the choices whose share is the load f of the balance losses; None: experts_TK.
        load_TE: [T, E] smooth estimate of being chosen (Shazeer et al. 2017, eq. 9), differentiable; None: the router
            has no noise.
        last_BE: [B, E] score of the last token that each expert took of each sequence, inf where it took none; None:
            experts take no tokens, or nothing is learnt from them.
    """

    logits_TE: Tensor
    probabilities_TE: Tensor
    ranking_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    weigh: Callable[[Tensor], Tensor]
    chosen_TK: Tensor | None = None
    declined_TK: Tensor | None = None
    counted_TM: Tensor | None = None
    load_TE: Tensor | None = None
    last_BE: Tensor | None = None
