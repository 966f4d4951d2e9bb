"""One capacity over all ranks: every rule gives, over real ranks, what it gives one process that has all tokens."""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from capacity_loops import ORDERS, POLICIES, batch_of, groups_by_loop, kept_by_loop, limits_by_loop, part_of
from moe_samples import context_of
from spawn import run_ranks
from torch import Tensor

from moe_train.config.routing import DeviceCapacityConfig, FactorCapacityConfig
from moe_train.dist.peers import Together
from moe_train.dist.world import World
from moe_train.moe.capacity import Capacity, Plan
from moe_train.moe.reroute import reroute_reference

EXPERTS, RANKS, PER_RANK, LENGTH, SEEDS = 8, 4, 2, 6, 2


def rules() -> list[Any]:
    """Every rule that counts over all ranks."""
    found: list[Any] = []
    for policy, order, reroute, renormalize in itertools.product(POLICIES, ORDERS, (False, True), ("before", "after")):
        fields = {"policy": policy, "order": order, "reroute": reroute, "renormalize": renormalize}
        found.append(FactorCapacityConfig(scope="global", factor=(0.6, 1.0)[len(found) % 2], **fields))
    found += [DeviceCapacityConfig(scope="global", devices=d, exempt_fraction=x) for d in (2, 4) for x in (0.0, 0.4)]
    return found


def plans_of(config: Any, seed: int, world: World) -> tuple[Plan, Plan]:
    """The plan of this rank's tokens, and what it is when one process has them all; rank 1 has none but padding."""
    routing, whole = batch_of(config, seed, RANKS * PER_RANK, LENGTH)
    whole.valid_BS[PER_RANK : 2 * PER_RANK] = False
    capacity = Capacity(config, EXPERTS, 2)
    first = world.rank * PER_RANK
    valid_BS = whole.valid_BS[first : first + PER_RANK]
    assert dist.group.WORLD is not None
    here = context_of(PER_RANK, LENGTH, valid_BS, seed=seed, peers=Together(dist.group.WORLD), first=first)
    tokens = slice(first * LENGTH, (first + PER_RANK) * LENGTH)
    return capacity.plan(part_of(routing, tokens), here, True), capacity.plan(routing, whole, True)


def tables(plan: Plan) -> dict[str, Tensor]:
    found = {"kept": plan.kept_TK, "experts": plan.experts_TK, "weights": plan.weights_TK}
    return found if plan.rerouted_TK is None else {**found, "rerouted": plan.rerouted_TK}


def check_rules(world: World) -> int:
    drops = 0
    for config, seed in itertools.product(rules(), range(SEEDS)):
        here, whole = plans_of(config, seed, world)
        tokens = slice(world.rank * PER_RANK * LENGTH, (world.rank + 1) * PER_RANK * LENGTH)
        for name, table in tables(here).items():
            assert torch.equal(table, tables(whole)[name][tokens]), f"{config}, seed {seed}: {name}"
        drops += int((~whole.kept_TK).sum())
    return drops


def test_trap_25_a_capacity_over_ranks_with_unequal_valid_tokens_is_that_of_one_process() -> None:
    assert min(run_ranks(check_rules, RANKS)) > 0, "the cases need drops"


def test_the_plan_of_one_process_is_that_of_plain_loops() -> None:
    for config, seed in itertools.product(rules(), range(2)):
        routing, context = batch_of(config, seed, RANKS * PER_RANK, LENGTH)
        plan = Capacity(config, EXPERTS, 2).plan(routing, context, training=True)
        kept_TK, experts_TK = kept_by_loop(config, routing, context, EXPERTS), routing.experts_TK
        if plan.rerouted_TK is not None:
            limits_Q = torch.tensor(limits_by_loop(config, context, 2, EXPERTS))
            refused_TK = context.valid_T.unsqueeze(1) & ~kept_TK
            group_T = torch.tensor(groups_by_loop(config.scope, context))
            experts_TK, moved_TK = reroute_reference(
                routing.ranking_TE, experts_TK, refused_TK, kept_TK, group_T, limits_Q
            )
            kept_TK = kept_TK | moved_TK
            assert torch.equal(plan.rerouted_TK, moved_TK), config
        assert torch.equal(plan.kept_TK, kept_TK), config
        assert torch.equal(plan.experts_TK, experts_TK), config
