"""Roles: every parameter has exactly one, and a forgotten one is found at once."""

import pytest
from moe_samples import make_layer
from routing_cases import DIM, ROUTERS
from torch import nn

from moe_train.moe.roles import Kind, roles_of
from moe_train.moe.routers import build_router


def test_of_a_layer() -> None:
    roles = roles_of(make_layer(4, 2))
    assert {name: role.kind for name, role in roles.items()} == {
        "router.weight": Kind.ROUTER,
        "experts.gate_up_LDF2": Kind.EXPERT,
        "experts.down_LFD": Kind.EXPERT,
    }
    assert roles["experts.down_LFD"].experts == range(4)
    assert roles["router.weight"].experts == range(0)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_parameter_is_replicated_and_has_initial_values(name: str) -> None:
    ffn = ROUTERS[name]
    router = build_router(ffn, DIM, init_std=0.5)
    roles = roles_of(router)
    assert {role.kind for role in roles.values()} <= {Kind.ROUTER}
    stds = {parameter: (role.std, role.truncated) for parameter, role in roles.items()}
    if name == "hash":
        assert stds == {}
    elif name == "switch":
        assert stds == {"weight": ((0.1 / DIM) ** 0.5, True)}
    else:
        expected = (0.0 if name == "noisy_topk" else 0.5, False)
        assert set(stds.values()) == {expected}
        assert "weight" in stds


def test_a_parameter_without_a_role_is_named() -> None:
    layer = make_layer(4, 2)
    layer.router.bias = nn.Parameter(layer.router.weight[:, 0].detach())
    with pytest.raises(AssertionError, match="ScoreRouter declares no role for its parameter bias"):
        roles_of(layer)
