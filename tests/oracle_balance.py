"""Every balance loss as its textbook formula over the whole batch, differentiated by autograd; figures; the bias."""

from __future__ import annotations

import math

import torch
from oracle_capacity import Placed
from oracle_routers import Decision
from oracle_tokens import Token, by_group
from torch import Tensor


def counts_of(choices: list[list[int]], num_experts: int) -> Tensor:
    """How often each expert occurs."""
    return torch.tensor([sum(chosen.count(e) for chosen in choices) for e in range(num_experts)], dtype=torch.float64)


SCOPES = {"global": "step", "sequence": "sequence", "micro": "rank"}
"""The tokens of a loss's scope, as a token names its groups."""


def aux_loss(num_experts: int, tokens: list[Token], decisions: list[Decision], scope: str, devices: int = 0) -> Tensor:
    """E·Σ f·P of each group, weighted by its tokens; with ``devices``, of groups of experts instead of experts."""
    bins = devices or num_experts
    total = torch.zeros((), dtype=torch.float64)
    for members in by_group(tokens, SCOPES[scope]):
        counts_E = counts_of([decisions[t].counted for t in members], num_experts)
        means_E = sum(decisions[t].probabilities_E for t in members) / len(members)
        for b in range(bins):
            inside = range(b * num_experts // bins, (b + 1) * num_experts // bins)
            share = sum(counts_E[e] for e in inside) / counts_E.sum()
            total = total + len(members) * bins * share * sum(means_E[e] for e in inside)
    return total / len(tokens)


def communication_loss(ffn, tokens: list[Token], decisions: list[Decision]) -> Tensor:
    """D/(M·T)·Σ_d visits_d·P_d (DeepSeek-V2, eq. 29 to 31)."""
    config, num_experts = ffn.balance.communication, ffn.num_experts
    groups = ffn.router.top_groups if ffn.router.kind == "group_limited" else ffn.top_k
    most = min(groups, ffn.top_k, config.devices)
    size = num_experts // config.devices
    total = torch.zeros((), dtype=torch.float64)
    for members in by_group(tokens, SCOPES[config.scope]):
        for d in range(config.devices):
            visits = sum(any(e // size == d for e in decisions[t].taken) for t in members)
            mean = sum(decisions[t].probabilities_E[e] for t in members for e in range(d * size, (d + 1) * size))
            total = total + config.devices * visits / most * mean / len(members)
    return total / len(tokens)


def squared_variation(values_E: Tensor) -> Tensor:
    """Population variance over squared mean."""
    mean = values_E.sum() / len(values_E)
    return ((values_E - mean) ** 2).sum() / len(values_E) / mean**2


def importance_loss(num_experts: int, decisions: list[Decision]) -> Tensor:
    """CV² of the summed weights."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]
    for decision in decisions:
        for e, weight, is_chosen in zip(
            decision.experts, decision.weigh(decision.experts), decision.chosen, strict=True
        ):
            if is_chosen:
                sums[e] = sums[e] + weight
    return squared_variation(torch.stack(sums))


def load_loss(num_experts: int, decisions: list[Decision]) -> Tensor:
    """CV² of the smooth load; of the counts when there is none."""
    if decisions[0].load_E is None:
        return squared_variation(counts_of([d.taken for d in decisions], num_experts))
    return squared_variation(sum(d.load_E for d in decisions))


def z_loss(decisions: list[Decision]) -> Tensor:
    """Mean of logsumexp²."""
    return sum(torch.log(torch.exp(d.logits_E).sum()) ** 2 for d in decisions) / len(decisions)


def entropy_loss(tokens: list[Token], decisions: list[Decision], scope: str, heads: int = 1) -> Tensor:
    """Σ p·log p of the mean softmax of each group's logits, weighted by its tokens; of each head's experts alone."""
    total = torch.zeros((), dtype=torch.float64)
    for members in by_group(tokens, SCOPES[scope]):
        for h in range(heads):
            shares = []
            for t in members:
                own_E = torch.exp(decisions[t].logits_E.chunk(heads)[h])
                shares.append(own_E / own_E.sum())
            mean_E = sum(shares) / len(members)
            total = total + len(members) * (mean_E * torch.log(mean_E)).sum()
    return total / len(tokens)


def losses(ffn, tokens: list[Token], decisions: list[Decision]) -> dict[str, tuple[float, Tensor]]:
    """Coefficient and value of each loss of a layer; what is only reported has coefficient 0."""
    balance, num_experts = ffn.balance, ffn.num_experts + ffn.num_noop_experts
    aux = balance.aux
    aux_value = aux_loss(num_experts, tokens, decisions, aux.scope if aux else "global")
    found = {
        "aux_loss": (aux.coef if aux else 0.0, aux_value),
        "z_loss": (balance.z_loss.coef if balance.z_loss else 0.0, z_loss(decisions)),
    }
    if balance.importance_load:
        found["importance_loss"] = balance.importance_load.importance_coef, importance_loss(num_experts, decisions)
        found["load_loss"] = balance.importance_load.load_coef, load_loss(num_experts, decisions)
    if balance.entropy:
        value = entropy_loss(tokens, decisions, balance.entropy.scope)
        found["entropy_loss"] = balance.entropy.coef, value
    if balance.device:
        value = aux_loss(num_experts, tokens, decisions, balance.device.scope, balance.device.devices)
        found["device_loss"] = balance.device.coef, value
    if balance.communication:
        found["communication_loss"] = balance.communication.coef, communication_loss(ffn, tokens, decisions)
    return found


def moved_bias(config, bias: list[float], decisions: list[Decision]) -> list[float]:
    """The bias after an optimizer step (arXiv 2408.15664, algorithm 1)."""
    counts = counts_of([d.taken for d in decisions], len(bias)).tolist()
    mean = sum(counts) / len(counts)
    moved = []
    for b, count in zip(bias, counts, strict=True):
        error = (mean > count) - (mean < count) if config.update == "sign" else (mean - count) / mean
        moved.append(b + config.rate * error)
    return moved


def moved_threshold(
    decay: float, threshold: list[float], tokens: list[Token], decisions: list[Decision]
) -> list[float]:
    """The running mean of the scores of the last tokens taken of each sequence, after an optimizer step."""
    moved = []
    for e, old in enumerate(threshold):
        taken = [
            [decisions[t].ranking[e] for t in members if decisions[t].chosen[e]]
            for members in by_group(tokens, "sequence")
        ]
        last = [min(scores) for scores in taken if scores]
        mean = sum(last) / len(last) if last else old
        moved.append(decay * old + (1 - decay) * mean if old > 0 else mean)
    return moved


def layer_figures(num_experts: int, decisions: list[Decision], placed: Placed, num_noops: int = 0) -> dict[str, object]:
    """What is reported of a layer."""
    counts = counts_of([d.taken for d in decisions], num_experts + num_noops).tolist()
    assignments = sum(counts)
    noop_share = {"noop_share": sum(counts[num_experts:]) / assignments} if num_noops else {}
    entropy = 0.0
    for decision in decisions:
        entropy -= sum(p * math.log(p) for p in decision.probabilities_E.tolist() if p > 0)
    dropped = placed.dropped_capacity + placed.dropped_device + placed.dropped_router
    return {
        "load": [count / assignments for count in counts],
        "dropped_fraction": dropped / assignments,
        "dropped_capacity_fraction": placed.dropped_capacity / assignments,
        "dropped_device_fraction": placed.dropped_device / assignments,
        "dropped_router_fraction": placed.dropped_router / assignments,
        "rerouted_fraction": placed.rerouted / assignments,
        "max_violation": max(counts) / assignments * len(counts) - 1,
        "entropy": entropy / len(decisions),
        "dead_experts": sum(count == 0 for count in counts[:num_experts]),
        **noop_share,
    }
