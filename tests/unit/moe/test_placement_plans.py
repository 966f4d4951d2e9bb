"""Plans and roles after experts changed places: the layer as it was, with its experts elsewhere."""

from __future__ import annotations

import pytest
import torch
from moe_samples import context_of, ffn_of, make_layer, tokens
from torch import Tensor

from moe_train.config.routing import DroplessConfig, FactorCapacityConfig
from moe_train.dist.parts import Part
from moe_train.moe.capacity import Plan, Slots
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.placement import Placement, set_placement
from moe_train.moe.roles import roles_of

CPU = torch.device("cpu")
ORDER = [2, 0, 3, 1]
"""Expert at each place; so experts 0, 1, 2, 3 are at places 1, 3, 0, 2."""


def plan_of(experts_TK: Tensor, slots: Slots | None = None) -> Plan:
    weights_TK = torch.arange(experts_TK.numel(), dtype=torch.float64).view_as(experts_TK)
    return Plan(experts_TK, weights_TK, torch.ones_like(experts_TK, dtype=torch.bool), True, slots=slots)


def test_experts_become_places_and_all_else_stays() -> None:
    placement = Placement(4)
    placement.set(ORDER, CPU)
    plan = plan_of(torch.tensor([[0, 1], [2, 3]]))
    placed = placement(plan)
    assert placed.experts_TK.tolist() == [[1, 3], [0, 2]]
    assert placed.weights_TK is plan.weights_TK and placed.kept_TK is plan.kept_TK and placed.slots is None


def test_the_run_of_an_expert_in_a_buffer_moves_with_it() -> None:
    placement = Placement(4)
    placement.set(ORDER, CPU)
    # Runs of three; 12 stands for what is not kept.
    slots = Slots(torch.tensor([[0, 4], [8, 11], [12, 12]]), per_expert=3)
    placed = placement(plan_of(torch.tensor([[0, 1], [2, 3], [0, 1]]), slots))
    assert placed.slots is not None and placed.slots.per_expert == 3
    assert placed.slots.slots_TK.tolist() == [[3, 10], [2, 8], [12, 12]]


def test_without_moves_the_plan_is_the_same() -> None:
    placement, plan = Placement(4), plan_of(torch.tensor([[0, 1]]))
    assert placement(plan) is plan
    placement.set(ORDER, CPU)
    placement.set(range(4), CPU)
    assert placement(plan) is plan


@pytest.mark.parametrize("experts", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]])
def test_places_are_a_permutation(experts: list[int]) -> None:
    with pytest.raises(AssertionError, match="not the 4 experts"):
        Placement(4).set(experts, CPU)


@pytest.mark.parametrize("capacity", [DroplessConfig(), FactorCapacityConfig(factor=0.7)], ids=["dropless", "factor"])
def test_a_layer_with_its_experts_elsewhere_is_the_same_layer(capacity) -> None:
    ffn = ffn_of(4, 2, capacity, normalize="selected")
    layer, moved = make_layer(ffn=ffn), make_layer(ffn=ffn)
    set_placement(moved, ORDER)
    with torch.no_grad():
        for parameter in moved.experts.parameters():
            parameter.copy_(parameter[ORDER])
    x_BSD = tokens(3, 5)
    found, true = (one(x_BSD, context_of(3, 5)) for one in (moved, layer))
    torch.testing.assert_close(found.y_BSD, true.y_BSD, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found.record.tensors(), true.record.tensors(), strict=True))
    (gradient,), (expected,) = (torch.autograd.grad(out.y_BSD.square().sum(), x_BSD) for out in (found, true))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_roles_name_the_experts_at_the_places_held_here() -> None:
    layer = make_layer(exchange=Half(4))
    set_placement(layer, ORDER)
    roles = roles_of(layer)
    assert roles["experts.down_LFD"].experts == roles["experts.gate_up_LDF2"].experts == (3, 1)
    assert roles["router.weight"].experts == range(0)
    assert roles["experts.down_LFD"].std == 0.5
    part = Part.of_experts(layer.experts.down_LFD, roles["experts.down_LFD"].experts, 4)
    assert [box.offsets for box in part.boxes] == [(3, 0, 0), (1, 0, 0)]


class Half(LocalExchange):
    """The second of two ranks."""

    @property
    def experts(self) -> range:
        return range(2, 4)
