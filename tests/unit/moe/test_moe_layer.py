"""The whole layer on one rank against a plain loop, and where its gradients go."""

import pytest
import torch
from moe_samples import DIM, IdentityExperts, make_layer, plain_loop, tokens
from torch import nn

from moe_train.config.schema import FactorCapacityConfig

CHOICES = [(1, "none"), (1, "selected"), (2, "none"), (2, "selected"), (4, "selected")]


@pytest.mark.parametrize(("top_k", "normalize"), CHOICES)
def test_equals_the_plain_loop(top_k: int, normalize: str) -> None:
    layer, x_BSD = make_layer(4, top_k, normalize=normalize), tokens(3, 5)
    variables = [x_BSD, *layer.parameters()]
    results = []
    for y_BSD in (layer(x_BSD).y_BSD, plain_loop(layer, x_BSD.flatten(0, 1)).view_as(x_BSD)):
        gradients = torch.autograd.grad(y_BSD.square().sum(), variables, materialize_grads=True)
        results.append([y_BSD, *gradients])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identity_experts_make_the_identity(top_k: int) -> None:
    layer, x_BSD = make_layer(4, top_k), tokens(3, 5)
    layer.experts = IdentityExperts(4)
    assert torch.allclose(layer(x_BSD).y_BSD, x_BSD, rtol=0, atol=1e-14)


def test_the_router_learns_from_the_task_alone() -> None:
    """No balance loss here: the gradient comes by way of the weights of the experts."""
    layer, x_BSD = make_layer(4, 2), tokens(3, 5)
    layer(x_BSD).y_BSD.square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().max() > 1e-3


def test_an_expert_without_tokens_gets_zeros_not_none() -> None:
    layer, x_BSD = make_layer(4, 2), tokens(3, 5)
    nn.init.zeros_(layer.router.weight)  # everybody chooses experts 0 and 1
    layer(x_BSD).y_BSD.square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[2:], torch.zeros_like(parameter.grad[2:]))
        assert parameter.grad[:2].abs().max() > 0


def test_padding_visits_no_expert() -> None:
    layer, x_BSD = make_layer(4, 2), tokens(2, 6)
    valid_BS = torch.arange(6) < torch.tensor([[4], [0]])
    output = layer(x_BSD, valid_BS)
    assert torch.equal(output.y_BSD[~valid_BS], torch.zeros(8, DIM, dtype=torch.float64))
    assert torch.allclose(output.y_BSD[0, :4], layer(x_BSD[:1, :4]).y_BSD[0], rtol=0, atol=1e-14)
    assert output.record.counts_E.sum().item() == 4 * 2
    assert output.record.dropped.item() == 0


def test_only_padding_gives_zeros_and_zero_gradients() -> None:
    layer, x_BSD = make_layer(4, 2, FactorCapacityConfig()), tokens(1, 6)
    output = layer(x_BSD, torch.zeros(1, 6, dtype=torch.bool))
    assert torch.equal(output.y_BSD, torch.zeros_like(x_BSD))
    output.y_BSD.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_forward_changes_nothing() -> None:
    """Activation checkpointing runs forward twice: nothing may be counted in it."""
    layer, x_BSD = make_layer(4, 2, FactorCapacityConfig(factor=0.5)), tokens(2, 6)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = layer(x_BSD), layer(x_BSD)
    assert torch.equal(first.y_BSD, second.y_BSD)
    assert torch.equal(first.record.counts_E, second.record.counts_E)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_shared_network_sees_every_token_unweighted() -> None:
    layer, x_BSD = make_layer(4, 2), tokens(2, 6)
    routed_BSD = layer(x_BSD).y_BSD
    layer.shared = nn.Linear(DIM, DIM, dtype=torch.float64)
    assert torch.allclose(layer(x_BSD).y_BSD, routed_BSD + layer.shared(x_BSD), rtol=0, atol=1e-14)


def test_bf16_tokens_come_back_in_bf16() -> None:
    layer = make_layer(4, 2).float()
    x_BSD = tokens(2, 6).detach().bfloat16()
    output = layer(x_BSD)
    assert output.y_BSD.dtype == torch.bfloat16
    assert output.record.z_sum.dtype == torch.float32
    exact_BSD = layer(x_BSD.float()).y_BSD
    assert (output.y_BSD.float() - exact_BSD).abs().max() < 0.05 * exact_BSD.abs().max()
