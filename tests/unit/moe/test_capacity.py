"""Capacity: who is kept. The queue itself is compared with a plain loop in tests/property."""

import itertools
import math

import pytest
import torch
from moe_samples import make_layer, plain_loop, routing_to, tokens
from torch import Tensor

from moe_train.config.schema import DroplessConfig, FactorCapacityConfig
from moe_train.moe.capacity import Capacity, Plan

EXPERTS, LENGTH = 4, 6
ALL_TO_TWO = torch.tensor([[0, 1]]).expand(2 * LENGTH, 2)


def plan_of(experts_TK: Tensor, factor: float, valid_BS: Tensor | None = None, training: bool = True) -> Plan:
    config = FactorCapacityConfig(factor=factor)
    capacity = Capacity(config, EXPERTS, experts_TK.shape[1])
    return capacity.plan(routing_to(experts_TK, EXPERTS), valid_BS, LENGTH, training)


@pytest.mark.parametrize(
    ("factor", "length", "top_k", "experts", "expected"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 8, 2, 4, 5),
        (1.1, 8, 2, 4, 5),
        (1.0, 7, 1, 4, 2),
        (0.01, 8, 1, 4, 1),
        (1.0, 1, 1, 64, 1),
    ],
)
def test_the_limit_is_rounded_up_and_at_least_one(
    factor: float, length: int, top_k: int, experts: int, expected: int
) -> None:
    capacity = Capacity(FactorCapacityConfig(factor=factor), experts, top_k)
    assert capacity.limit(length, training=True) == expected


def test_evaluation_has_a_limit_of_its_own() -> None:
    unlimited = Capacity(FactorCapacityConfig(factor=1.0), EXPERTS, 2)
    assert unlimited.limit(8, training=False) is None
    limited = Capacity(FactorCapacityConfig(factor=1.0, eval_factor=2.0), EXPERTS, 2)
    assert limited.limit(8, training=False) == 8
    assert Capacity(DroplessConfig(), EXPERTS, 2).limit(8, training=True) is None


def test_the_earliest_of_each_sequence_are_kept() -> None:
    kept_BS = plan_of(ALL_TO_TWO, factor=1.0).kept_TK[:, 0].view(2, LENGTH)
    assert math.ceil(1.0 * LENGTH * 2 / EXPERTS) == 3
    assert kept_BS.tolist() == [[True] * 3 + [False] * 3] * 2


def test_padding_takes_no_room() -> None:
    valid_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    valid_BS[:, :2] = False
    kept_BS = plan_of(ALL_TO_TWO, 1.0, valid_BS).kept_TK[:, 0].view(2, LENGTH)
    assert kept_BS.tolist() == [[False] * 2 + [True] * 3 + [False]] * 2


def test_a_later_token_never_changes_an_earlier_drop() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(LENGTH, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    kept_TK = plan_of(experts_TK, 0.7).kept_TK
    assert not kept_TK.all()
    for t in range(LENGTH):
        for first in range(EXPERTS):
            changed_TK = experts_TK.clone()
            changed_TK[t] = torch.tensor([first, (first + 1) % EXPERTS])
            assert torch.equal(plan_of(changed_TK, 0.7).kept_TK[:t], kept_TK[:t])


@pytest.mark.parametrize(("top_k", "normalize"), [(1, "none"), (2, "selected"), (4, "selected")])
def test_a_large_factor_is_dropless_bit_for_bit(top_k: int, normalize: str) -> None:
    results = []
    for capacity in (DroplessConfig(), FactorCapacityConfig(factor=EXPERTS)):
        layer, x_BSD = make_layer(EXPERTS, top_k, capacity, normalize), tokens(2, LENGTH)
        y_BSD = layer(x_BSD).y_BSD
        results.append([y_BSD, *torch.autograd.grad(y_BSD.square().sum(), [x_BSD, *layer.parameters()])])
    for dropless, limited in zip(*results, strict=True):
        assert torch.equal(dropless, limited)


def test_dropped_assignments_contribute_nothing_and_are_counted() -> None:
    layer, x_BSD = make_layer(EXPERTS, 1, FactorCapacityConfig(factor=0.5), "none"), tokens(3, LENGTH)
    torch.nn.init.zeros_(layer.router.weight)  # everybody chooses expert 0, which takes one token per sequence
    output = layer(x_BSD)
    assert torch.equal(output.y_BSD[:, 1:], torch.zeros(3, LENGTH - 1, x_BSD.shape[2], dtype=torch.float64))
    assert output.y_BSD[:, 0].abs().min() > 0
    assert output.record.dropped.item() == 3 * (LENGTH - 1)
    assert output.record.counts_E.tolist() == [3 * LENGTH, 0, 0, 0]


def test_surviving_weights_are_not_renormalised() -> None:
    layer, x_BSD = make_layer(EXPERTS, 2, FactorCapacityConfig(factor=0.6)), tokens(2, LENGTH)
    routing = layer.router(x_BSD.flatten(0, 1))
    kept_TK = layer.capacity.plan(routing, None, LENGTH, training=True).kept_TK
    assert (kept_TK.sum(dim=1) == 1).any(), "the case needs a token that keeps one of its two choices"
    expected_TD = plain_loop(layer, x_BSD.flatten(0, 1), kept_TK)
    assert torch.allclose(layer(x_BSD).y_BSD.flatten(0, 1), expected_TD, rtol=0, atol=1e-13)


def test_more_room_never_drops_more() -> None:
    experts_TK = torch.randint(EXPERTS, (2 * LENGTH, 1), generator=torch.Generator().manual_seed(0))
    kept = [plan_of(experts_TK, factor).kept_TK for factor in (0.1, 0.7, 1.3, 2.0, 4.0)]
    for fewer, more in itertools.pairwise(kept):
        assert (fewer <= more).all()
    assert kept[-1].all()
