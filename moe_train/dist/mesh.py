"""Which rank holds which experts: pure arithmetic, and the process groups that follow from it.

All W ranks are data-parallel. `ep` consecutive ranks hold one whole set of experts between them (an EP group, so that
its exchange stays inside a node when it can); the W / ep ranks with the same place in their group hold the same experts
(an expert-data group, `edp`).

Runs of `dp_shard` consecutive ranks may share the dense weights between them, with gradients and optimizer state, as do
runs of ranks of an expert-data group with those of its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_train.dist.world import World

GroupMaker: TypeAlias = Callable[..., tuple[dist.ProcessGroup, list[dist.ProcessGroup]]]


@dataclass(frozen=True)
class Layout:
    """Arithmetic of ranks.

    Attributes:
        world_size: number of ranks W.
        ep: ranks that share one set of experts; divides W.
        dp_shard: ranks that share one set of dense weights; divides W. 1: each has all of them.
    """

    world_size: int
    ep: int
    dp_shard: int = 1

    def __post_init__(self) -> None:
        """Check the two rules."""
        assert self.world_size % self.ep == 0, f"ep={self.ep} must divide the {self.world_size} ranks"
        assert self.world_size % self.dp_shard == 0, f"dp_shard={self.dp_shard} must divide the {self.world_size} ranks"

    @property
    def expert_shard(self) -> int:
        """Ranks that share one expert's weights: as many as `dp_shard` where so many hold it."""
        return math.gcd(self.dp_shard, self.world_size // self.ep)

    def ep_rank(self, rank: int) -> int:
        """Return the place of ``rank`` in its EP group."""
        return rank % self.ep

    def ep_groups(self) -> list[list[int]]:
        """Return the EP groups, each a list of ranks."""
        return [list(range(first, first + self.ep)) for first in range(0, self.world_size, self.ep)]

    def edp_groups(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same experts."""
        return [list(range(place, self.world_size, self.ep)) for place in range(self.ep)]

    def shard_groups(self) -> list[list[int]]:
        """Return the groups of ranks that share one set of dense weights: runs of consecutive ones."""
        return runs(range(self.world_size), self.dp_shard)

    def replica_groups(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same shard of the dense weights."""
        return with_same_place(range(self.world_size), self.dp_shard)

    def expert_shard_groups(self) -> list[list[int]]:
        """Return the groups of ranks that share one set of experts' weights: runs of an expert-data group."""
        return [run for group in self.edp_groups() for run in runs(group, self.expert_shard)]

    def expert_replica_groups(self) -> list[list[int]]:
        """Return the groups of ranks that hold the same shard of the same experts' weights."""
        return [same for group in self.edp_groups() for same in with_same_place(group, self.expert_shard)]

    def experts(self, rank: int, num_experts: int) -> range:
        """Return the global indices of the experts that ``rank`` holds."""
        assert num_experts % self.ep == 0, f"ep={self.ep} must divide the {num_experts} experts"
        held = num_experts // self.ep
        return range(self.ep_rank(rank) * held, (self.ep_rank(rank) + 1) * held)


def runs(ranks: Sequence[int], length: int) -> list[list[int]]:
    """Return ranks cut into runs of a length that divides their number."""
    return [list(ranks[first : first + length]) for first in range(0, len(ranks), length)]


def with_same_place(ranks: Sequence[int], length: int) -> list[list[int]]:
    """Return the ranks that have the same place in their run, by place."""
    return [list(ranks[place::length]) for place in range(length)]


@dataclass(frozen=True)
class Sharding:
    """Over which ranks weights are sharded, in the form that torch asks for: dimensions (replicate, shard).

    Attributes:
        dense: of the weights that every rank needs.
        experts: of the weights of this rank's experts; only of ranks that hold the same.
    """

    dense: DeviceMesh
    experts: DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """The groups of this rank.

    Attributes:
        layout: the arithmetic.
        rank: this rank.
        world: every rank: dense and router gradients are summed over it.
        ep: the ranks that this rank exchanges tokens with.
        edp: the ranks that hold the same experts: expert gradients are summed over it.
        sharding: how weights are sharded; None: every rank has those it needs.
    """

    layout: Layout
    rank: int
    world: dist.ProcessGroup
    ep: dist.ProcessGroup
    edp: dist.ProcessGroup
    sharding: Sharding | None = None

    @property
    def ep_rank(self) -> int:
        """This rank's place in its EP group."""
        return self.layout.ep_rank(self.rank)


def build_mesh(world: World, ep: int, dp_shard: int = 1) -> Mesh:
    """Make the groups; every rank calls this at the same point.

    Args:
        world: the processes.
        ep: expert-parallel size; divides the number of ranks.
        dp_shard: ranks that share one set of dense weights; divides the number of ranks.
    """
    layout = Layout(world.size, ep, dp_shard)
    # Sub-groups do not inherit the timeout of the world: without it a hang there lasts 30 minutes.
    timeout = timedelta(seconds=world.timeout_s)
    new_groups = cast("GroupMaker", dist.new_subgroups_by_enumeration)
    ep_group, _ = new_groups(layout.ep_groups(), timeout=timeout)
    edp_group, _ = new_groups(layout.edp_groups(), timeout=timeout)
    assert dist.group.WORLD is not None, "build_mesh needs the process group of world_from_environment"
    sharding = build_sharding(layout, world, new_groups, timeout) if dp_shard > 1 else None
    return Mesh(layout, world.rank, dist.group.WORLD, ep_group, edp_group, sharding)


def build_sharding(layout: Layout, world: World, new_groups: GroupMaker, timeout: timedelta) -> Sharding:
    """Make the groups over which weights are sharded; every rank calls this at the same point."""

    def device_mesh(ranks: list[list[int]], replicas: list[list[int]], shards: list[list[int]]) -> DeviceMesh:
        groups = [new_groups(kind, timeout=timeout)[0] for kind in (replicas, shards)]
        # Made from groups: those that torch makes for a mesh of its own would wait for 30 minutes.
        return DeviceMesh.from_group(
            groups, world.device.type, mesh=torch.tensor(ranks), mesh_dim_names=("replicate", "shard")
        )

    own = runs(layout.edp_groups()[layout.ep_rank(world.rank)], layout.expert_shard)
    dense = device_mesh(layout.shard_groups(), layout.replica_groups(), layout.shard_groups())
    experts = device_mesh(own, layout.expert_replica_groups(), layout.expert_shard_groups())
    return Sharding(dense, experts)
