"""Where there is room for all, every capacity rule is dropless, bit for bit, and identity experts are the identity."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_samples import DIM, IdentityExperts, context_of, ffn_of, make_layer, tokens
from routing_cases import LEARNED
from torch import Tensor, nn

from moe_train.config.model import FFNConfig
from moe_train.config.routing import CapacityConfig, DeviceCapacityConfig, DroplessConfig, FactorCapacityConfig
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import Arrived, exchange_for
from moe_train.moe.layer import MoELayer

EXPERTS, BATCH, LENGTH = 8, 3, 6
UNABLE_TO_REROUTE = ("expert_choice", "hierarchical")
PADDED_BS = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [0]])


def rules(factor: float) -> list[CapacityConfig]:
    """Every policy, order, scope, rerouting, renormalisation, padding; and devices."""
    found: list[CapacityConfig] = []
    for policy, order, reroute, renormalize, (scope, pad) in itertools.product(
        ("position", "probability", "random"),
        ("token", "choice"),
        (False, True),
        ("before", "after"),
        (("sequence", False), ("sequence", True), ("rank", False), ("rank", True), ("global", False)),
    ):
        fields = {"policy": policy, "order": order, "reroute": reroute, "renormalize": renormalize}
        found.append(FactorCapacityConfig(factor=factor, scope=scope, pad=pad, **fields))
    scopes = ("sequence", "rank", "global")
    return found + [DeviceCapacityConfig(factor=factor, scope=scope, devices=2) for scope in scopes]


def results_of(layer: MoELayer, valid_BS: Tensor | None) -> list[Tensor]:
    """Output and all gradients."""
    x_BSD = tokens(BATCH, LENGTH)
    y_BSD = layer(x_BSD, context_of(BATCH, LENGTH, valid_BS, seed=3)).y_BSD
    variables = [x_BSD, *layer.parameters()]
    return [y_BSD, *torch.autograd.grad(y_BSD.square().sum(), variables, materialize_grads=True)]


def layer_with(config: CapacityConfig, ffn: FFNConfig) -> MoELayer:
    """A layer; with a process group when its buffers are of fixed size."""
    exchange = exchange_for(build_mesh(WORLD, 1), ffn.num_experts, is_padded(config)) if is_padded(config) else None
    return make_layer(exchange=exchange, ffn=ffn.model_copy(update={"capacity": config}))


WORLD = World(0, 1, torch.device("cpu"), 30.0)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Any:
    with joined(dist.HashStore(), WORLD):
        yield


@pytest.mark.parametrize("padding", [False, True])
def test_a_large_factor_is_dropless_bit_for_bit_in_every_rule(padding: bool) -> None:
    """With fixed buffers the products of the experts have more rows, by which their last bits may differ."""
    valid_BS = PADDED_BS if padding else None
    ffn = ffn_of(EXPERTS, 2, DroplessConfig())
    expected = results_of(layer_with(DroplessConfig(), ffn), valid_BS)
    for config in rules(factor=EXPERTS):
        for found, value in zip(results_of(layer_with(config, ffn), valid_BS), expected, strict=True):
            if is_padded(config):
                assert torch.allclose(found, value, rtol=1e-12, atol=1e-12), config
            else:
                assert torch.equal(found, value), config


class RowByRow(nn.Module):
    """Experts each row of which is computed for itself, whatever the others are."""

    def __init__(self, matrices_LDD: Tensor) -> None:
        super().__init__()
        self.matrices_LDD = matrices_LDD

    def forward(self, arrived: Arrived) -> Tensor:
        sums_RD = torch.zeros_like(arrived.rows_RD)
        for r, k in (arrived.experts_RK < len(self.matrices_LDD)).nonzero().tolist():
            y_D = self.matrices_LDD[arrived.experts_RK[r, k]] @ arrived.rows_RD[r]
            sums_RD[r] = sums_RD[r] + arrived.weights_RK[r, k] * y_D
        return sums_RD


@torch.no_grad()
def test_a_large_factor_with_fixed_buffers_is_dropless_bit_for_bit_when_rows_do_not_share_products() -> None:
    generator, x_BSD = torch.Generator().manual_seed(0), tokens(BATCH, LENGTH)
    experts = RowByRow(torch.randn(EXPERTS, DIM, DIM, dtype=torch.float64, generator=generator))
    outputs = []
    for config in (DroplessConfig(), *(rule for rule in rules(EXPERTS)[::4] if is_padded(rule))):
        layer = layer_with(config, ffn_of(EXPERTS, 2, config))
        layer.experts = experts
        outputs.append(layer(x_BSD, context_of(BATCH, LENGTH, PADDED_BS)).y_BSD)
    assert len(outputs) > 6
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("name", LEARNED)
def test_a_large_factor_is_dropless_bit_for_bit_for_every_router(name: str) -> None:
    """Weights are formed again for what was rerouted, by the router's own rule: here nothing was."""
    ffn = LEARNED[name].model_copy(update={"expert_dim": 5})
    reroute = not name.startswith(UNABLE_TO_REROUTE)
    config = FactorCapacityConfig(factor=EXPERTS, reroute=reroute, renormalize="after")
    expected = results_of(layer_with(DroplessConfig(), ffn), PADDED_BS)
    for found, value in zip(results_of(layer_with(config, ffn), PADDED_BS), expected, strict=True):
        assert torch.equal(found, value)


def identity_layer(config: CapacityConfig) -> MoELayer:
    layer = layer_with(config, ffn_of(EXPERTS, 2, config))
    layer.experts = IdentityExperts(EXPERTS)
    return layer


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "rank"])
def test_trap_29_identity_experts_are_the_identity_when_what_is_refused_finds_room(scope: str, pad: bool) -> None:
    """The E - K others of a token cannot all be full: together they hold as much as there is."""
    config = FactorCapacityConfig(factor=EXPERTS / (EXPERTS - 2), reroute=True, scope=scope, pad=pad)
    layer, x_BSD = identity_layer(config), tokens(BATCH, LENGTH)
    with torch.no_grad():
        layer.router.weight[2:] *= 0.1  # experts 0 and 1 are popular
    output = layer(x_BSD, context_of(BATCH, LENGTH))
    assert output.record.rerouted.item() > 0
    assert output.record.dropped_capacity.item() == 0
    assert torch.allclose(output.y_BSD, x_BSD, rtol=0, atol=1e-14)


@pytest.mark.parametrize("config", [*rules(EXPERTS)[::7], DroplessConfig()])
def test_trap_29_identity_experts_are_the_identity_without_drops(config: CapacityConfig) -> None:
    layer, x_BSD = identity_layer(config), tokens(BATCH, LENGTH)
    assert torch.allclose(layer(x_BSD, context_of(BATCH, LENGTH)).y_BSD, x_BSD, rtol=0, atol=1e-14)


def test_renormalised_survivors_make_identity_experts_the_identity_for_every_token_that_keeps_one() -> None:
    layer, x_BSD = identity_layer(FactorCapacityConfig(factor=0.6, renormalize="after")), tokens(BATCH, LENGTH)
    output = layer(x_BSD, context_of(BATCH, LENGTH))
    gone_BS = (output.y_BSD == 0).all(dim=2)
    assert output.record.dropped_capacity.item() > 2 * int(gone_BS.sum())
    assert torch.allclose(output.y_BSD[~gone_BS], x_BSD[~gone_BS], rtol=0, atol=1e-14)
