"""Budgets of devices: the smallest weights are dropped, but nothing of exempt sequences."""

import torch
from capacity_loops import kept_by_loop, random_routing
from moe_samples import context_of

from moe_train.config.routing import DeviceCapacityConfig
from moe_train.moe.capacity import Capacity, Plan
from moe_train.moe.routing import Routing

EXPERTS, LENGTH = 4, 6


def device_plan(config: DeviceCapacityConfig, batch: int, seed: int = 0) -> tuple[Routing, Plan]:
    routing = random_routing(batch * LENGTH, EXPERTS, 2, seed=4, dtype=torch.float64)
    return routing, Capacity(config, EXPERTS, 2).plan(routing, context_of(batch, LENGTH, seed=seed), training=True)


def test_a_device_drops_its_smallest_weights() -> None:
    routing, plan = device_plan(DeviceCapacityConfig(devices=2, exempt_fraction=0.0, scope="rank"), batch=4)
    assert plan.device_limited
    devices_TK = routing.experts_TK // 2
    for device in range(2):
        here_TK = devices_TK == device
        dropped = routing.weights_TK[here_TK & ~plan.kept_TK]
        if len(dropped):
            assert dropped.max() <= routing.weights_TK[here_TK & plan.kept_TK].min()
            assert int((here_TK & plan.kept_TK).sum()) == 4 * LENGTH * 2 // 2


def test_only_exempt_sequences_exceed_a_device_budget_and_they_use_it_up() -> None:
    config = DeviceCapacityConfig(devices=2, exempt_fraction=0.5, scope="rank", factor=0.5)
    batch = 8
    routing, plan = device_plan(config, batch)
    context = context_of(batch, LENGTH)
    loop_TK = kept_by_loop(config, routing, context, EXPERTS)
    assert torch.equal(plan.kept_TK, loop_TK)
    whole_B = plan.kept_TK.view(batch, -1).all(dim=1)
    assert 0 < int(whole_B.sum()) < batch
    budget = batch * LENGTH * 2 // 4
    for device in range(2):
        kept_TK = plan.kept_TK & (routing.experts_TK // 2 == device)
        exempt = int(kept_TK.view(batch, -1)[whole_B].sum())
        assert int(kept_TK.sum()) <= max(exempt, budget)


def test_the_exempt_fraction_of_sequences_is_within_three_sigma() -> None:
    batch, share = 4000, 0.1
    config = DeviceCapacityConfig(devices=1, factor=1e-9, exempt_fraction=share, scope="rank")
    _, plan = device_plan(config, batch)
    exempt = int(plan.kept_TK.view(batch, -1).all(dim=1).sum())
    assert abs(exempt - share * batch) < 3 * (batch * share * (1 - share)) ** 0.5


def test_other_sequences_are_exempt_in_another_step() -> None:
    config = DeviceCapacityConfig(devices=1, factor=1e-9, exempt_fraction=0.5)
    first, second = (device_plan(config, 64, seed)[1].kept_TK for seed in (1, 2))
    assert not torch.equal(first, second)
