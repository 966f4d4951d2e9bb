"""Every router in a small size, routers at given scores, and a batch in parts, for the tests of routing."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.model import FFNConfig
from moe_train.dist.peers import Alone, Peers
from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.routers import build_router
from moe_train.moe.routing import Routing

EXPERTS, DIM = 8, 6


def ffn_of(kind: str, num_experts: int, top_k: int, balance: dict[str, Any] | None = None, **router: Any) -> FFNConfig:
    """The configuration of a layer: only what routing reads."""
    sections = {"router": {"kind": kind, **router}, "balance": balance or {}}
    return FFNConfig.model_validate({"num_experts": num_experts, "top_k": top_k, **sections})


V2 = {"scores": "softmax", "group_score": "max", "normalize": "none"}
ROUTERS: dict[str, FFNConfig] = {
    "topk": ffn_of("topk", EXPERTS, 2),
    "topk_unnormalised": ffn_of("topk", EXPERTS, 3, normalize="none"),
    "topk_softmax": ffn_of("topk_softmax", EXPERTS, 2),
    "sigmoid": ffn_of("sigmoid", EXPERTS, 2),
    "sigmoid_top_1": ffn_of("sigmoid", EXPERTS, 1, normalize="none"),
    "noisy_topk": ffn_of("noisy_topk", EXPERTS, 2),
    "switch": ffn_of("switch", EXPERTS, 1),
    "gshard": ffn_of("gshard", EXPERTS, 2),
    "gshard_sampled": ffn_of("gshard", EXPERTS, 2, second="sampled", dispatch_threshold=0.5),
    "group_limited_v3": ffn_of("group_limited", EXPERTS, 3, scale=2.5),
    "group_limited_v2": ffn_of("group_limited", EXPERTS, 3, **V2),
    "expert_choice": ffn_of("expert_choice", EXPERTS, 2, allow_future_leak=True),
    "hash": ffn_of("hash", EXPERTS, 2),
    "sinkhorn": ffn_of("sinkhorn", EXPERTS, 2),
    "sinkhorn_top_1": ffn_of("sinkhorn", EXPERTS, 1),
    "base": ffn_of("base", EXPERTS, 1),
    "hierarchical": ffn_of("hierarchical", EXPERTS, 2),
    "hierarchical_2x2": ffn_of("hierarchical", EXPERTS, 4, groups=4, top_groups=2),
}
LEARNED = {name: ffn for name, ffn in ROUTERS.items() if name != "hash"}
OF_ALL_TOKENS = {"sinkhorn", "sinkhorn_top_1", "base"}
"""Whose choice in training depends on every token of every rank."""


def with_router(ffn: FFNConfig, **changes: Any) -> FFNConfig:
    """The same with other fields of the router."""
    return ffn.model_copy(update={"router": ffn.router.model_copy(update=changes)})


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router_of(ffn: FFNConfig, dim: int = DIM, training: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A router with random weights."""
    router = build_router(ffn, dim, init_std=1.0).to(dtype).train(training)
    with torch.no_grad():
        for place, parameter in enumerate(router.parameters()):
            parameter.copy_(random(*parameter.shape, seed=place + 1))
    return router


def context_of(
    batch: int, length: int, seed: int = 0, valid_BS: Tensor | None = None, peers: Peers | None = None, first: int = 0
) -> RoutingContext:
    """Sequences ``first`` onward of a global batch; the ids are all different."""
    sequences_B = torch.arange(first, first + batch)
    ids_BS = sequences_B.unsqueeze(1) * length + torch.arange(length)
    return RoutingContext(ids_BS, sequences_B, valid_BS, seed, peers or Alone())


def at_logits(
    ffn: FFNConfig,
    logits_TE: Tensor,
    context: RoutingContext | None = None,
    training: bool = False,
    bias_E: Tensor | None = None,
) -> Routing:
    """What a router with one matrix decides at given scores: the matrix is the identity, a token its own scores."""
    tokens, experts = logits_TE.shape
    router = build_router(ffn, experts, init_std=1.0).to(logits_TE.dtype).train(training)
    router.weight = nn.Parameter(torch.eye(experts, dtype=logits_TE.dtype))
    if bias_E is not None:
        router.bias_E.copy_(bias_E)
    routing: Routing = router(logits_TE, context or context_of(1, tokens))
    return routing


def at_two_levels(ffn: FFNConfig, group_logits_TG: Tensor, logits_TE: Tensor) -> Routing:
    """The same for the router with two matrices: a token is both scores side by side."""
    groups, experts = group_logits_TG.shape[1], logits_TE.shape[1]
    router = build_router(ffn, groups + experts, init_std=1.0).to(logits_TE.dtype).eval()
    identity = torch.eye(groups + experts, dtype=logits_TE.dtype)
    router.group_weight, router.weight = nn.Parameter(identity[:groups]), nn.Parameter(identity[groups:])
    routing: Routing = router(torch.cat([group_logits_TG, logits_TE], dim=1), context_of(1, len(logits_TE)))
    return routing


@dataclass
class Meeting:
    """Where threads that play ranks exchange what they have."""

    num_parts: int
    slots: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [torch.empty(0)] * self.num_parts
        self.barrier = threading.Barrier(self.num_parts, timeout=20)


@dataclass(frozen=True)
class Part:
    """One thread's peers: it holds part ``index`` of the batch."""

    index: int
    meeting: Meeting

    def _all(self, x: Tensor) -> list[Tensor]:
        self.meeting.slots[self.index] = x.detach().clone()
        self.meeting.barrier.wait()
        everybody = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return everybody

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(dim=0)

    def before(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), *self._all(x)[: self.index]]).sum(dim=0)

    def gather(self, x_TD: Tensor) -> tuple[Tensor, int]:
        everybody = self._all(x_TD)
        return torch.cat(everybody), sum(len(x) for x in everybody[: self.index])


def in_parts(work: Callable[[int, Peers], Any], num_parts: int) -> list[Any]:
    """Run ``work(index, peers)`` for every part at the same time, as ranks would, and return the results in order."""
    meeting = Meeting(num_parts)
    with ThreadPoolExecutor(num_parts) as pool:
        return list(pool.map(lambda index: work(index, Part(index, meeting)), range(num_parts)))


def record_of(ffn: FFNConfig, routing: Routing, context: RoutingContext, training: bool = True) -> RoutingRecord:
    """What the layer's capacity and balance make of a routing."""
    plan = Capacity(ffn.capacity, ffn.num_experts, ffn.top_k).plan(routing, context, training)
    return RoutingRecord.of(routing, plan, context, Balance(ffn))


def losses_of(ffn: FFNConfig, records: list[RoutingRecord], tokens: int) -> dict[str, Tensor]:
    """The unweighted losses per token of a step whose parts have these records."""
    totals = reduce(operator.add, records).statistics
    return {name: value / tokens for name, value in Balance(ffn).values(totals).items()}


def balance_in_parts(
    ffn: FFNConfig,
    logits_TE: Tensor,
    length: int,
    sizes: list[int],
    valid_BS: Tensor | None = None,
    training: bool = True,
) -> tuple[dict[str, float], Tensor]:
    """A step whose micro-batches, on whatever ranks, hold so many sequences each.

    Returns:
        The unweighted losses per valid token, and the gradient of the weighted ones by the logits [T, E].
    """
    logits_TE = logits_TE.detach().requires_grad_()
    records, first = [], 0
    for size in sizes:
        valid = None if valid_BS is None else valid_BS[first : first + size]
        context = context_of(size, length, valid_BS=valid, first=first)
        routing = at_logits(ffn, logits_TE[first * length :][: size * length], context, training)
        records.append(record_of(ffn, routing, context, training))
        first += size
    tokens = first * length if valid_BS is None else int(valid_BS.sum())
    totals = reduce(operator.add, [record.detached() for record in records]).statistics
    total = sum(Balance(ffn).share(record, totals) for record in records)
    (gradient_TE,) = torch.autograd.grad(total / tokens + 0.0 * logits_TE.sum(), logits_TE)
    return {name: value.item() for name, value in losses_of(ffn, records, tokens).items()}, gradient_TE
