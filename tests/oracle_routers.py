"""How every router decides, one token and one expert at a time; only Sinkhorn and expert choice see several tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from oracle_tokens import DISPATCH, EXPERT_DROPOUT, JITTER, NOISE, SECOND_EXPERT, Token, by_group, derived, unit
from torch import Tensor

NEVER = -math.inf


@dataclass
class Decision:
    """What was decided for one token.

    Attributes:
        logits_E: differentiable.
        probabilities_E: differentiable.
        ranking: what the experts were chosen by.
        experts: the choices, best first.
        weigh: weights, as scalars, of any experts.
        chosen: whether each choice is one.
        declined: choices that the router gave up.
        counted: the experts that count as load in the balance losses.
        load_E: smooth load, differentiable; None without noise.
    """

    logits_E: Tensor
    probabilities_E: Tensor
    ranking: list[float]
    experts: list[int]
    weigh: Callable[[list[int]], list[Tensor]]
    chosen: list[bool] = field(default_factory=list)
    declined: list[bool] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    load_E: Tensor | None = None

    def __post_init__(self):
        self.chosen = self.chosen or [True] * len(self.experts)
        self.declined = self.declined or [False] * len(self.experts)
        self.counted = self.counted or self.taken

    @property
    def taken(self) -> list[int]:
        """The experts chosen, declined ones included."""
        return [e for e, is_chosen in zip(self.experts, self.chosen, strict=True) if is_chosen]


@dataclass
class Router:
    """One layer's router: its config, parameters and bias."""

    config: object
    num_experts: int
    top_k: int
    weights: dict[str, Tensor]
    bias: list[float] | None

    def seen(self, token: Token) -> Tensor:
        """The router's own copy of the token, jittered."""
        width = len(token.x_D)
        if not self.config.jitter:
            return token.x_D
        factors = [1 - self.config.jitter + 2 * self.config.jitter * u for u in token.draws(JITTER, width)]
        return token.x_D * torch.tensor(factors, dtype=token.x_D.dtype)

    def logits(self, token: Token) -> Tensor:
        x_D = self.seen(token)
        if "hidden_ND" in self.weights:
            x_D = self.weights["hidden_ND"] @ x_D + self.weights["hidden_bias_N"]
            x_D = x_D * (x_D > 0)
        return self.weights["weight"] @ x_D + self.weights.get("logit_bias_E", 0.0)

    def offered(self, token: Token, ranking: list[float]) -> list[float]:
        """The ranking without the experts that dropout hides."""
        if not self.config.expert_dropout:
            return ranking
        draws = token.draws(EXPERT_DROPOUT, self.num_experts)
        return [NEVER if u < self.config.expert_dropout else r for u, r in zip(draws, ranking, strict=True)]

    def biased(self, scores_E: Tensor, logits_E: Tensor) -> list[float]:
        """What to choose by: scores and bias; without a bias the logits, in the same order."""
        if self.bias is None:
            return logits_E.tolist()
        return [s + b for s, b in zip(scores_E.tolist(), self.bias, strict=True)]


def fp32(value: float) -> float:
    """Tokens compete by fp32 numbers: what differs by less is equal, and the earlier token wins."""
    return torch.tensor(value, dtype=torch.float32).item()


def best(ranking: list[float], k: int) -> list[int]:
    """The k largest, the lowest index first among equals."""
    return sorted(range(len(ranking)), key=lambda e: (-ranking[e], e))[:k]


def scaled(router: Router, weights: list[Tensor]) -> list[Tensor]:
    return [router.config.scale * w for w in weights]


def normalised(router: Router, scores_E: Tensor, mode: str) -> Callable[[list[int]], list[Tensor]]:
    """Scores as weights, divided by their sum when asked."""

    def weigh(experts: list[int]) -> list[Tensor]:
        total = sum(scores_E[e] for e in experts) if mode == "selected" else 1.0
        return scaled(router, [scores_E[e] / total for e in experts])

    return weigh


def softmax_of_chosen(router: Router, logits_E: Tensor) -> Callable[[list[int]], list[Tensor]]:
    def weigh(experts: list[int]) -> list[Tensor]:
        total = sum(torch.exp(logits_E[e]) for e in experts)
        return scaled(router, [torch.exp(logits_E[e]) / total for e in experts])

    return weigh


def softmax(z_E: Tensor) -> Tensor:
    exponentials_E = torch.exp(z_E - z_E.max().detach())
    return exponentials_E / exponentials_E.sum()


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def decide(router: Router, logits_E: Tensor, probabilities_E: Tensor, ranking: list[float], weigh) -> Decision:
    """The K best. With a bias the losses count what would be chosen without one (DeepSeek-V3, eq. 18)."""
    experts = best(ranking, router.top_k)
    counted = [] if router.bias is None else best(logits_E.tolist(), router.top_k)
    return Decision(logits_E, probabilities_E, ranking, experts, weigh, counted=counted)


def topk(router: Router, token: Token) -> Decision:
    z = router.logits(token)
    p = softmax(z)
    mode = getattr(router.config, "normalize", "none")
    return decide(router, z, p, router.offered(token, router.biased(p, z)), normalised(router, p, mode))


def topk_softmax(router: Router, token: Token) -> Decision:
    z = router.logits(token)
    p = softmax(z)
    return decide(router, z, p, router.offered(token, router.biased(p, z)), softmax_of_chosen(router, z))


def sigmoid_router(router: Router, token: Token) -> Decision:
    z = router.logits(token)
    s = sigmoid(z)
    ranking = router.offered(token, router.biased(s, s))
    return decide(router, z, s / s.sum(), ranking, normalised(router, s, router.config.normalize))


def noisy_topk(router: Router, token: Token) -> Decision:
    seen_D = router.seen(token)
    z = router.weights["weight"] @ seen_D
    deviation_E = torch.log(1 + torch.exp(router.weights["noise"] @ seen_D))
    draws = [NormalDist().inv_cdf(u) for u in token.draws(NOISE, router.num_experts)]
    noisy_E = z + torch.tensor(draws, dtype=z.dtype) * deviation_E
    ranking = router.offered(token, noisy_E.tolist())
    load_E = None
    if router.top_k < router.num_experts:
        loads = []
        for e in range(router.num_experts):
            others = [i for i in best(ranking, router.num_experts) if i != e]
            threshold = noisy_E[others[router.top_k - 1]]  # the K-th largest without e
            loads.append((1 + torch.erf((z[e] - threshold) / deviation_E[e] / math.sqrt(2))) / 2)
        load_E = torch.stack(loads)
    found = decide(router, z, softmax(z), ranking, softmax_of_chosen(router, noisy_E))
    found.load_E = load_E
    return found


def gshard(router: Router, token: Token) -> Decision:
    z = router.logits(token)
    p = softmax(z)
    ranking = router.offered(token, router.biased(p, z))
    (first,) = best(ranking, 1)
    chances = list(ranking)
    if router.config.second == "sampled":
        draws = token.draws(SECOND_EXPERT, router.num_experts)
        chances = [z[e].item() - math.log(-math.log(draws[e])) for e in range(router.num_experts)]
        chances = [NEVER if ranking[e] == NEVER else chances[e] for e in range(router.num_experts)]
    chances[first] = NEVER
    second = next(e for e in best(chances, router.num_experts) if e != first)

    def weigh(experts: list[int]) -> list[Tensor]:
        total = sum(p[e] for e in experts) + 1e-9
        return scaled(router, [p[e] / total for e in experts])

    is_declined = False
    if router.config.dispatch_threshold is not None:
        share = (p[second] / (p[first] + p[second] + 1e-9)).item()
        is_declined = token.draws(DISPATCH, 1)[0] * router.config.dispatch_threshold >= share
    counted = [first] if router.bias is None else best(z.tolist(), 1)
    return Decision(z, p, ranking, [first, second], weigh, declined=[False, is_declined], counted=counted)


def group_limited(router: Router, token: Token) -> Decision:
    config = router.config
    z = router.logits(token)
    s = sigmoid(z) if config.scores == "sigmoid" else softmax(z)
    bias = router.bias or [0.0] * router.num_experts
    ranking = [score + b for score, b in zip(s.tolist(), bias, strict=True)]
    size = router.num_experts // config.groups
    scores = []
    for g in range(config.groups):
        members = sorted(ranking[g * size : (g + 1) * size], reverse=True)
        scores.append(members[0] if config.group_score == "max" else members[0] + members[1])
    groups = best(scores, config.top_groups)
    ranking = router.offered(token, [r if e // size in groups else NEVER for e, r in enumerate(ranking)])
    return decide(router, z, s / s.sum(), ranking, normalised(router, s, config.normalize))


def hash_router(router: Router, token: Token) -> Decision:
    """Only the token's id decides."""
    num_experts, top_k = router.num_experts, router.top_k
    ranking = [unit(derived(0), token.id * num_experts + e) for e in range(num_experts)]
    experts = best(ranking, top_k)
    nothing_E = torch.zeros(num_experts, dtype=token.x_D.dtype)
    probabilities_E = torch.tensor(
        [1 / top_k if e in experts else 0.0 for e in range(num_experts)], dtype=nothing_E.dtype
    )
    weight = torch.tensor(router.config.scale / top_k, dtype=nothing_E.dtype)
    return Decision(nothing_E, probabilities_E, ranking, experts, lambda experts: [weight] * len(experts))


def hierarchical(router: Router, token: Token) -> Decision:
    config = router.config
    seen_D = router.seen(token)
    z = router.weights["weight"] @ seen_D
    zg = router.weights["group_weight"] @ seen_D
    size = router.num_experts // config.groups
    inside = router.top_k // config.top_groups
    inner_E = torch.cat([softmax(z[g * size : (g + 1) * size]) for g in range(config.groups)])
    outer_G = softmax(zg)
    probabilities_E = torch.stack([outer_G[e // size] * inner_E[e] for e in range(router.num_experts)])
    ranking = router.offered(token, z.tolist())
    groups = best(zg.tolist(), config.top_groups)
    experts, weights = [], {}
    for g in groups:
        outer = torch.exp(zg[g]) / sum(torch.exp(zg[i]) for i in groups)
        members = [g * size + e for e in best(ranking[g * size : (g + 1) * size], inside)]
        total = sum(torch.exp(z[e]) for e in members)
        for e in members:
            experts.append(e)
            weights[e] = config.scale * outer * torch.exp(z[e]) / total
    return Decision(z, probabilities_E, ranking, experts, lambda experts: [weights[e] for e in experts])


ALONE = {
    "topk": topk,
    "switch": topk,
    "topk_softmax": topk_softmax,
    "sigmoid": sigmoid_router,
    "noisy_topk": noisy_topk,
    "gshard": gshard,
    "group_limited": group_limited,
    "hash": hash_router,
    "hierarchical": hierarchical,
}
"""Routers that decide for one token at a time."""


def expert_choice(router: Router, tokens: list[Token]) -> list[Decision]:
    """Each expert takes its best tokens of each sequence."""
    decisions = []
    for token in tokens:
        z = router.logits(token)
        p = softmax(z)
        ranking = router.offered(token, p.tolist())
        experts = list(range(router.num_experts))
        weigh = normalised(router, p, "none")
        decisions.append(Decision(z, p, ranking, experts, weigh, chosen=[False] * router.num_experts))
    for members in by_group(tokens, "sequence"):
        room = min(len(members), max(1, len(members) * router.top_k // router.num_experts))
        for e in range(router.num_experts):
            for t in sorted(members, key=lambda t: (-fp32(decisions[t].ranking[e]), t))[:room]:
                decisions[t].chosen[e] = decisions[t].ranking[e] != NEVER
    for decision in decisions:
        decision.counted = decision.taken
    return decisions


def sinkhorn(router: Router, tokens: list[Token]) -> list[Decision]:
    """Plain Sinkhorn over all tokens of a forward pass, in Python's floats."""
    decisions = [topk_softmax(router, token) for token in tokens]
    experts = range(router.num_experts)
    for members in by_group(tokens, "pass"):
        cost = {t: [math.exp(z - max(row)) for z in row] for t in members for row in [decisions[t].logits_E.tolist()]}
        d1 = [1.0 for _ in experts]
        for _ in range(router.config.max_iterations):
            d0 = {t: 1 / (len(members) * (sum(d1[e] * cost[t][e] for e in experts) + 1e-8)) for t in members}
            new = [1 / (len(d1) * (sum(d0[t] * cost[t][e] for t in members) + 1e-8)) for e in experts]
            change = sum(abs(a - b) for a, b in zip(new, d1, strict=True)) / len(d1)
            d1 = new
            if change < router.config.tolerance:
                break
        for t in members:
            found = decisions[t]
            found.ranking = router.offered(tokens[t], [d1[e] * cost[t][e] * d0[t] for e in experts])
            found.experts = found.counted = best(found.ranking, router.top_k)
            if router.top_k == 1:
                found.weigh = normalised(router, sigmoid(found.logits_E), "none")
    return decisions


def route(router: Router, tokens: list[Token]) -> list[Decision]:
    """Decide for all valid tokens of a layer, those of the whole global batch."""
    kind = router.config.kind
    if kind in ALONE:
        return [ALONE[kind](router, token) for token in tokens]
    return {"expert_choice": expert_choice, "sinkhorn": sinkhorn}[kind](router, tokens)
