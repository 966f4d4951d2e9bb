"""Balance losses: additive statistics of the tokens, and a function of the totals over the whole optimizer step.

That split is what makes each of them exact on every layout. Statistics add up over ranks and micro-batches; the loss is
formed from the totals; and its gradient reaches a token through the token's own statistics, at the slope that the
totals give. In these formulas E is the number of cells (experts or devices) and n the number of valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from moe_train.config.balance import Scope
from moe_train.moe.context import RoutingContext
from moe_train.moe.queues import count
from moe_train.moe.routing import Routing


@dataclass(frozen=True)
class RoutedTokens:
    """One forward pass as the losses see it; padding counts nowhere.

    Attributes:
        routing: what the router decided.
        context: the tokens.
    """

    routing: Routing
    context: RoutingContext

    @cached_property
    def chosen_TK(self) -> Tensor:
        """[T, K] bool: the choices of valid tokens."""
        valid_TK = self.context.valid_T.unsqueeze(1).expand_as(self.routing.experts_TK)
        return valid_TK if self.routing.chosen_TK is None else valid_TK & self.routing.chosen_TK

    @cached_property
    def assigned_BE(self) -> Tensor:
        """[B, E] int64: assignments per sequence and expert, before any is dropped."""
        return self.count(self.routing.experts_TK, self.chosen_TK)

    @cached_property
    def counts_BE(self) -> Tensor:
        """[B, E] int64: those that count for the load f."""
        counted_TM = self.routing.counted_TM
        if counted_TM is None:
            return self.assigned_BE
        return self.count(counted_TM, self.context.valid_T.unsqueeze(1).expand_as(counted_TM))

    @property
    def assigned_E(self) -> Tensor:
        """[E] int64: assignments per expert, before any is dropped."""
        return self.assigned_BE.sum(dim=0)

    @cached_property
    def mass_BE(self) -> Tensor:
        """[B, E] fp64: summed probabilities per sequence and expert."""
        masked_TE = self.routing.probabilities_TE * self.context.valid_T.unsqueeze(1)
        return masked_TE.view(-1, self.context.length, masked_TE.shape[1]).sum(dim=1).to(torch.float64)

    @cached_property
    def tokens_1(self) -> Tensor:
        """[1] fp64: valid tokens."""
        return self.context.valid_T.sum(dtype=torch.float64).view(1)

    def count(self, experts_TM: Tensor, counted_TM: Tensor) -> Tensor:
        """Return [B, E] int64: how often the choices of each sequence that count name each expert."""
        num_experts = self.routing.logits_TE.shape[1]
        sequence_T = torch.arange(experts_TM.shape[0], device=experts_TM.device) // self.context.length
        num_cells = (experts_TM.shape[0] // self.context.length) * num_experts
        cells_TM = torch.where(counted_TM, sequence_T.unsqueeze(1) * num_experts + experts_TM, num_cells)
        return count(cells_TM, num_cells).view(-1, num_experts)

    def visits(self, devices: int) -> Tensor:
        """Return [B, devices] int64: the tokens of each sequence with a choice among the experts of each device."""
        size = self.routing.logits_TE.shape[1] // devices
        device_TK = torch.where(self.chosen_TK, self.routing.experts_TK // size, devices)
        visited = torch.zeros(device_TK.shape[0], devices + 1, dtype=torch.int64, device=device_TK.device)
        visited.scatter_(1, device_TK, 1)
        return visited[:, :devices].view(-1, self.context.length, devices).sum(dim=1)


class BalanceLoss(Protocol):
    """One loss of one layer."""

    @property
    def name(self) -> str:
        """Its key in the records."""

    @property
    def coef(self) -> float:
        """Weight relative to the cross-entropy per token."""

    @property
    def needs_totals(self) -> bool:
        """Whether the gradient depends on the totals; else the loss is the sum of its statistics."""

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return the statistics of one forward pass: an fp64 vector, additive over tokens, differentiable."""

    def value(self, totals: Tensor) -> Tensor:
        """Return n times the unweighted loss, a scalar, from the totals of the statistics; differentiable."""


def balance_sum(counts_E: Tensor, mass_E: Tensor) -> Tensor:
    """Return E·Σ_e f_e·(Σ_t p_te): n times the load-balance loss (Switch Transformer, eq. 4 to 6, for any K).

    f_e is the share of assignments, Σ f = 1, so that the loss is exactly 1.0 when probabilities are even, for every K.
    No gradient flows through f.

    Args:
        counts_E: [..., E] assignments of all the tokens over which f is taken.
        mass_E: [..., E] sums of their probabilities.
    """
    share_E = counts_E.to(mass_E.dtype) / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts_E.shape[-1] * (share_E.detach() * mass_E).sum(dim=-1)


@dataclass(frozen=True)
class ShareLoss:
    """E·Σ f·P over experts or devices, f being a share of assignments or of visits.

    Over experts: Switch, eq. 4. Over devices: DeepSeek-V2 (arXiv 2405.04434), eq. 26. Over visits: eq. 29, where f is
    a share of ``most_visits`` · n, so that a balanced router that uses all the devices it may costs 1.0.

    Attributes:
        name: key in the records.
        coef: weight.
        scope: tokens over which f is taken.
        cells: experts E, or devices that hold E / cells consecutive experts.
        most_visits: devices that a token may visit; None: f counts assignments.
    """

    name: str
    coef: float
    scope: Scope
    cells: int
    most_visits: int | None = None

    @property
    def needs_totals(self) -> bool:
        """Only a load of the whole step has to be known first."""
        return self.scope == "global"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return counts and mass of the cells [2·cells], or for the other scopes the finished sum [1]."""
        num_sequences = tokens.mass_BE.shape[0]
        mass_BM = tokens.mass_BE.view(num_sequences, self.cells, -1).sum(dim=2)
        if self.most_visits is None:
            counts_BM = tokens.counts_BE.view(num_sequences, self.cells, -1).sum(dim=2)
        else:
            counts_BM = tokens.visits(self.cells)
        if self.scope == "sequence":
            return self.sum(counts_BM, mass_BM).sum().view(1)
        counts_M, mass_M = counts_BM.sum(dim=0), mass_BM.sum(dim=0)
        return self.sum(counts_M, mass_M).view(1) if self.scope == "micro" else torch.cat([counts_M, mass_M])

    def sum(self, counts_M: Tensor, mass_M: Tensor) -> Tensor:
        """Return n times the loss of the tokens that were counted, from [..., cells]."""
        if self.most_visits is None:
            return balance_sum(counts_M, mass_M)
        # Probabilities of a token sum to one: the whole mass is the number of tokens.
        visits = self.most_visits * mass_M.detach().sum(dim=-1, keepdim=True).clamp(min=1)
        return self.cells * (counts_M / visits * mass_M).sum(dim=-1)

    def value(self, totals: Tensor) -> Tensor:
        """Return n times the loss."""
        if self.scope != "global":
            return totals.sum()
        counts_M, mass_M = totals.chunk(2)
        return self.sum(counts_M.detach(), mass_M)


@dataclass(frozen=True)
class VariationLoss:
    """CV(v)² = Var(v) / Mean(v)² over experts, of importance or of load (Shazeer et al. 2017, eq. 6 to 11).

    The variance is that of the population, as in the authors' code. The square of a sum over all tokens: exact on any
    layout only because the slope is taken at the totals.

    Attributes:
        name: key in the records.
        coef: weight.
        of: importance, the summed weights of an expert, or load, the expected number of its tokens.
    """

    name: str
    coef: float
    of: Literal["importance", "load"]

    @property
    def needs_totals(self) -> bool:
        """The slope of a square depends on where it is taken."""
        return True

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return [1 + E]: valid tokens, and each expert's importance or load."""
        return torch.cat([tokens.tokens_1, self.sums(tokens).to(torch.float64)])

    def sums(self, tokens: RoutedTokens) -> Tensor:
        """Return the importance or load [E]; without the router's noise the load is a count."""
        routing = tokens.routing
        if self.of == "importance":
            weights_TK = torch.where(tokens.chosen_TK, routing.weights_TK, 0.0)
            return torch.zeros_like(routing.probabilities_TE).scatter(1, routing.experts_TK, weights_TK).sum(dim=0)
        if routing.load_TE is None:
            return tokens.assigned_E
        return (routing.load_TE * tokens.context.valid_T.unsqueeze(1)).sum(dim=0)

    def value(self, totals: Tensor) -> Tensor:
        """Return n times CV²."""
        num_tokens, sums_E = totals[0].detach(), totals[1:]
        mean_square = sums_E.mean().square().clamp(min=torch.finfo(sums_E.dtype).tiny)
        return num_tokens * sums_E.var(correction=0) / mean_square


@dataclass(frozen=True)
class ZLoss:
    """Mean of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small, where fp32 is fine enough.

    Attributes:
        coef: weight.
    """

    coef: float
    name: str = "z_loss"

    @property
    def needs_totals(self) -> bool:
        """A plain sum."""
        return False

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return [1]: the sum over tokens, of raw logits."""
        squares_T = tokens.routing.logits_TE.logsumexp(dim=1).square()
        return (squares_T * tokens.context.valid_T).sum(dtype=torch.float64).view(1)

    def value(self, totals: Tensor) -> Tensor:
        """Return n times the loss."""
        return totals.sum()


@dataclass(frozen=True)
class EntropyLoss:
    """Σ_e p_e·log p_e with p the mean softmax of the logits (sigma-MoE, arXiv 2310.10837, eq. 20 and 21).

    Least, at -log E, when the mean is even: a single token may be as sure of itself as it likes. Where several routers
    stand side by side, one per head, each has a softmax of its own, and their losses are added.

    Attributes:
        coef: weight.
        scope: tokens over which p is the mean.
        heads: routers side by side, each with E / heads consecutive experts.
    """

    coef: float
    scope: Scope
    heads: int = 1
    name: str = "entropy_loss"

    @property
    def needs_totals(self) -> bool:
        """The logarithm is taken of a mean, which has to be known first."""
        return self.scope == "global"

    def measure(self, tokens: RoutedTokens) -> Tensor:
        """Return [1 + E]: valid tokens and the mass of the experts, or for the other scopes the finished sum [1]."""
        logits_TE, valid_T = tokens.routing.logits_TE, tokens.context.valid_T
        shares_THE = logits_TE.view(len(logits_TE), self.heads, -1).softmax(dim=2)
        masked_TE = (shares_THE.flatten(1) * valid_T.unsqueeze(1)).to(torch.float64)
        mass_BE = masked_TE.view(-1, tokens.context.length, masked_TE.shape[1]).sum(dim=1)
        if self.scope == "sequence":
            valid_B1 = valid_T.view(-1, tokens.context.length).sum(dim=1, keepdim=True)
            return self.sum(valid_B1, mass_BE).sum().view(1)
        if self.scope == "micro":
            return self.sum(tokens.tokens_1, mass_BE.sum(dim=0)).view(1)
        return torch.cat([tokens.tokens_1, mass_BE.sum(dim=0)])

    def sum(self, num_1: Tensor, mass_E: Tensor) -> Tensor:
        """Return n times the loss of n tokens [..., 1], from the sums of their shares [..., E]."""
        shares_E = mass_E / num_1.detach().clamp(min=1)
        # Without tokens the shares are 0, where the logarithm has no slope.
        logarithms_E = shares_E.clamp(min=torch.finfo(shares_E.dtype).tiny).log()
        return (num_1.detach() * shares_E * logarithms_E).sum(dim=-1)

    def value(self, totals: Tensor) -> Tensor:
        """Return n times the loss."""
        return self.sum(totals[:1], totals[1:]) if self.scope == "global" else totals.sum()
