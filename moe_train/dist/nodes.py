"""Which ranks share a node: pure arithmetic, and the groups by which a token crosses between nodes once.

A node is a run of consecutive ranks, between which exchange is cheap. An EP group that fills several nodes is a table
of nodes x places: a row of it is a node, and a column, its rail, holds the ranks with the same place in their nodes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from moe_train.dist.mesh import GroupMaker, Layout, Mesh


@dataclass(frozen=True)
class Nodes:
    """Arithmetic of the nodes of all EP groups.

    Attributes:
        layout: of the ranks.
        size: ranks n of a node; divides the EP size, and is less.
    """

    layout: Layout
    size: int

    def __post_init__(self) -> None:
        """Check the rule."""
        ep = self.layout.ep
        assert self.size < ep and ep % self.size == 0, f"nodes of {self.size} ranks do not divide an EP group of {ep}"

    def node_groups(self) -> list[list[int]]:
        """Return the ranks of each node."""
        return [list(range(first, first + self.size)) for first in range(0, self.layout.world_size, self.size)]

    def rail_groups(self) -> list[list[int]]:
        """Return, for each EP group and each place in a node, the ranks with that place, in order of their nodes."""
        return [group[place :: self.size] for group in self.layout.ep_groups() for place in range(self.size)]


@dataclass(frozen=True)
class NodeGroups:
    """The groups of this rank.

    Attributes:
        node: the ranks of its node, n of them.
        rail: the ranks of its EP group with its place in other nodes, and itself: ep / n, in order of nodes.
    """

    node: dist.ProcessGroup
    rail: dist.ProcessGroup


def build_node_groups(mesh: Mesh, size: int, timeout_s: float) -> NodeGroups:
    """Make the groups; every rank calls this at the same point.

    Args:
        mesh: the layout.
        size: ranks of a node; see `Nodes`.
        timeout_s: longest wait in one collective, in seconds: sub-groups do not inherit that of the world.
    """
    nodes, timeout = Nodes(mesh.layout, size), timedelta(seconds=timeout_s)
    new_groups = cast("GroupMaker", dist.new_subgroups_by_enumeration)
    node, _ = new_groups(nodes.node_groups(), timeout=timeout)
    rail, _ = new_groups(nodes.rail_groups(), timeout=timeout)
    return NodeGroups(node, rail)


def launched_node_size(world_size: int) -> int:
    """Return the ranks that the launcher started on this machine (``LOCAL_WORLD_SIZE``); all, where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
