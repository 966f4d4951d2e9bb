"""How experts share the classes of texts among themselves: figures of a matrix of counts, plain functions.

With N_ce the tokens of class c whose first choice is expert e, p(c|e) = N_ce / Σ_c N_ce. The names are those of
NoorMajdoub/Mixture-of-experts_MoE (README), which gives no formulas; these are the definitions here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def utilisation(by_class_CE: Tensor) -> Tensor:
    """Return each expert's share [E] of all first choices, fp64: they sum to one, or are all zero without any.

    Args:
        by_class_CE: [C, E] counts N_ce.
    """
    counts_E = by_class_CE.sum(dim=0).to(torch.float64)
    return counts_E / counts_E.sum().clamp(min=1)


def specialisation_by_expert(by_class_CE: Tensor) -> Tensor:
    """Return SI_e = 1 - H(p(·|e)) / ln C of each expert [E], fp64.

    1: all that comes to the expert is of one class; 0: all classes come alike. NaN for an expert to which nothing
    comes, and for all where there is only one class: it is undefined there.

    Args:
        by_class_CE: [C, E] counts N_ce.
    """
    counts_CE = by_class_CE.to(torch.float64)
    shares_CE = counts_CE / counts_CE.sum(dim=0)  # 0 / 0 of an idle expert is NaN, as it should
    if len(counts_CE) < 2:
        return torch.full_like(shares_CE[0], math.nan)
    entropy_E = -torch.xlogy(shares_CE, shares_CE).sum(dim=0)
    return 1.0 - entropy_E / math.log(len(counts_CE))


def specialisation(by_class_CE: Tensor) -> float | None:
    """Return SI, the mean of SI_e over the experts to which something comes, weighted by how much; None: undefined.

    Args:
        by_class_CE: [C, E] counts N_ce.
    """
    index_E, counts_E = specialisation_by_expert(by_class_CE), by_class_CE.sum(dim=0)
    live_E = index_E.isfinite()
    if not bool(live_E.any()):
        return None
    weights_E = counts_E[live_E].to(torch.float64)
    return float((weights_E * index_E[live_E]).sum() / weights_E.sum())


def load_balance_variance(shares_E: Tensor) -> float:
    """Return Var_e of the experts' shares: of the population, Σ_e (s_e - mean)² / E, not of a sample; 0 when even.

    Args:
        shares_E: [E] mean over tokens of the gate of each expert, zero where it is not chosen; or any other shares.
    """
    return float(shares_E.to(torch.float64).var(correction=0))
