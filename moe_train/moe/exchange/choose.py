"""Which exchange a layout gets: the one that was asked for or, by arithmetic, the one that sends least where it hurts.

With K distinct choices among E experts, drawn evenly, a place that holds E / p of them is visited by a share
v(p) = 1 - C(E - E / p, K) / C(E, K) of all tokens. Of an EP group of P ranks in M nodes of n, a token reaches

============ ========================= =========================
exchange     ranks in other nodes      ranks in all, but its own
============ ========================= =========================
alltoall     (P - n) · v(P)            (P - 1) · v(P)
hierarchical (M - 1) · v(M)            as before, and (M - 1) · v(M)
allgather    P - n                     P - 1
============ ========================= =========================

and each costs the same bytes (`AllToAllExchange`). Between nodes, where a link is an order of magnitude slower than
inside, the second leg of the hierarchical way pays when it saves a fifth or more; inside a node, sending all tokens
everywhere pays when nine of ten go everywhere anyway, for nobody counts them first. Not with gloo, whose all-gather
takes twice and whose reduce-scatter three times as long as an all-to-all of the same bytes (docs/performance.md).
Routers that prefer few nodes (group_limited) let the hierarchical way save more than this says; node limits are not
part of the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from moe_train.config.schema import LayoutConfig
from moe_train.dist.mesh import Layout, Mesh
from moe_train.dist.meter import METER
from moe_train.dist.nodes import build_node_groups, launched_node_size
from moe_train.moe.exchange.allgather import GatherExchange
from moe_train.moe.exchange.alltoall import AllToAllExchange
from moe_train.moe.exchange.hierarchical import HierarchicalExchange
from moe_train.moe.exchange.journey import Exchange
from moe_train.moe.exchange.local import LocalExchange
from moe_train.moe.exchange.padded import PaddedExchange

WORTH_A_LEG = 0.8
"""Hierarchical where it sends less than this share of what alltoall sends between nodes."""
NEARLY_ALL = 0.9
"""Allgather where at least this share of all tokens visits each rank."""


@dataclass(frozen=True)
class Choice:
    """An exchange and why.

    Attributes:
        kind: which; local where no token leaves its rank.
        node_size: ranks of a node.
        reason: one sentence for the log.
    """

    kind: Literal["local", "alltoall", "hierarchical", "allgather"]
    node_size: int
    reason: str


def visited(num_places: int, num_experts: int, top_k: int) -> float:
    """Return the share v of tokens that visit one of so many places, between which the experts are shared evenly."""
    elsewhere = num_experts - num_experts // num_places
    return 1.0 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)


def choose(
    layout: Layout,
    num_experts: int,
    top_k: int,
    config: LayoutConfig,
    padded: bool,
    node_size: int,
    gathers_well: bool = True,
) -> Choice:
    """Return the exchange of a layout by the rule above.

    Args:
        layout: of the ranks.
        num_experts: experts E of a layer; 0 for a dense model.
        top_k: choices K per token.
        config: what was asked for.
        padded: whether buffers of fixed size travel.
        node_size: ranks of a node.
        gathers_well: whether an all-gather takes no longer than an all-to-all of the same bytes.
    """
    ep = layout.ep
    fills_nodes = 1 < node_size < ep and ep % node_size == 0
    if ep == 1 or num_experts == 0:
        return Choice("local", node_size, "every rank holds all experts: no token travels")
    if padded:
        return Choice("alltoall", node_size, "buffers of fixed size go straight to the ranks of their experts")
    if config.exchange == "hierarchical" and not fills_nodes:
        reason = f"EP groups of {ep} ranks do not fill several nodes of {node_size}: there is no second leg"
        return Choice("alltoall", node_size, reason)
    if config.exchange != "auto":
        return Choice(config.exchange, node_size, "parallel.exchange says so")
    if fills_nodes:
        return between_nodes(ep, node_size, num_experts, top_k)
    share = visited(ep, num_experts, top_k)
    told = f"{share:.0%} of the tokens visit each of the {ep} ranks of an EP group"
    if gathers_well and node_size >= ep and share >= NEARLY_ALL:
        return Choice("allgather", node_size, f"{told}: sending all saves the counting")
    return Choice("alltoall", node_size, told)


def between_nodes(ep: int, node_size: int, num_experts: int, top_k: int) -> Choice:
    """Choose for EP groups that fill several nodes."""
    nodes = ep // node_size
    straight = (ep - node_size) * visited(ep, num_experts, top_k)
    once = (nodes - 1) * visited(nodes, num_experts, top_k)
    told = f"a token visits {straight:.2f} ranks in {once:.2f} other nodes of {node_size}"
    if once < WORTH_A_LEG * straight:
        return Choice("hierarchical", node_size, f"{told}: it travels once to each")
    return Choice("alltoall", node_size, f"{told}: a second leg would save too little")


def exchange_for(
    mesh: Mesh,
    num_experts: int,
    padded: bool,
    config: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
    top_k: int = 1,
    node_size: int | None = None,
) -> Exchange:
    """Return the exchange of a layout. Collective: every rank calls this at the same point.

    Args:
        mesh: the layout.
        num_experts: experts E of a layer; 0 for a dense model.
        padded: whether capacity gives assignments places in buffers of fixed size (``capacity.pad``).
        config: which exchange, in how many parts, with how much patience.
        top_k: choices K per token.
        node_size: ranks of a node where ``config`` does not say; None: as many as the launcher started here.
    """
    choice = choice_for(mesh.layout, num_experts, padded, config, top_k, node_size)
    METER.node_size = choice.node_size
    unpadded: Exchange
    match choice.kind:
        case "local":
            unpadded = LocalExchange(num_experts)
        case "alltoall":
            unpadded = AllToAllExchange(mesh.ep, num_experts, config.overlap)
        case "allgather":
            unpadded = GatherExchange(mesh.ep, num_experts, config.overlap)
        case "hierarchical":
            groups = build_node_groups(mesh, choice.node_size, config.timeout_s)
            unpadded = HierarchicalExchange(mesh.ep, num_experts, config.overlap, groups=groups)
    return PaddedExchange(mesh.ep, num_experts, unpadded) if padded else unpadded


def choice_for(
    layout: Layout, num_experts: int, padded: bool, config: LayoutConfig, top_k: int, node_size: int | None = None
) -> Choice:
    """Return what `exchange_for` chooses, for the log; takes what that takes, and makes nothing."""
    size = config.node_size or node_size or launched_node_size(layout.world_size)
    on_gloo = dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO
    return choose(layout, num_experts, top_k, config, padded, size, gathers_well=not on_gloo)
