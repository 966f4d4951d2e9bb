"""Roles: every parameter has exactly one, and a forgotten one is found at once."""

import pytest
from moe_samples import make_layer
from torch import nn

from moe_train.moe.roles import Kind, roles_of


def test_of_a_layer() -> None:
    roles = roles_of(make_layer(4, 2))
    assert {name: role.kind for name, role in roles.items()} == {
        "router.weight": Kind.ROUTER,
        "experts.gate_up_LDF2": Kind.EXPERT,
        "experts.down_LFD": Kind.EXPERT,
    }
    assert roles["experts.down_LFD"].experts == range(4)
    assert roles["router.weight"].experts == range(0)


def test_a_parameter_without_a_role_is_named() -> None:
    layer = make_layer(4, 2)
    layer.router.bias = nn.Parameter(layer.router.weight[:, 0].detach())
    with pytest.raises(AssertionError, match="TopKRouter declares no role for its parameter bias"):
        roles_of(layer)
