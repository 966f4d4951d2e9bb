"""The experts of one rank against a plain loop over tokens: every activation, with and without biases."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.model import Activation
from moe_train.models.initialise import initialise
from moe_train.moe.exchange import Arrived
from moe_train.moe.experts import Experts
from moe_train.moe.roles import Kind, roles_of
from moe_train.ops.activation import GATED, activate

DIM, HIDDEN, HELD = 6, 4, 3
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
WITH_AND_WITHOUT_BIAS = pytest.mark.parametrize("biased", [False, True])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def experts_of(activation: Activation, biased: bool, dtype: torch.dtype = torch.float64) -> Experts:
    """Experts 4, 5 and 6 of some layer, no number like another."""
    experts = Experts(DIM, HIDDEN, range(4, 4 + HELD), 1.0, 1.0, activation, biased).to(dtype)
    for place, parameter in enumerate(experts.parameters()):
        parameter.data = random(*parameter.shape, seed=place + 50).to(dtype)
    return experts


def arrived_of(rows: list[list[int]], dtype: torch.dtype = torch.float64) -> Arrived:
    """Rows with their choices; HELD stands for an expert elsewhere, whose weight means nothing."""
    experts_RK = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
    weights_RK = torch.where(experts_RK < HELD, random(*experts_RK.shape, seed=1).abs(), torch.inf)
    rows_RD = random(len(rows), DIM, seed=2).to(dtype).requires_grad_()
    return Arrived(rows_RD, experts_RK, weights_RK.requires_grad_(), int((experts_RK < HELD).sum()), journey=None)


def plain_loop(experts: Experts, arrived: Arrived) -> Tensor:
    """Σ weight · (down(activation(gate_up(x))) of each expert held here)."""
    sums = []
    for x_D, choices, weights in zip(arrived.rows_RD, arrived.experts_RK.tolist(), arrived.weights_RK, strict=True):
        y_D = 0.0 * x_D
        for choice, weight in zip(choices, weights, strict=True):
            if choice == HELD:
                continue
            h_F2 = x_D @ experts.gate_up_LDF2[choice]
            if experts.gate_up_bias_LF2 is not None:
                h_F2 = h_F2 + experts.gate_up_bias_LF2[choice]
            out_D = (activate(h_F2.unsqueeze(0), experts.activation) @ experts.down_LFD[choice]).squeeze(0)
            if experts.down_bias_LD is not None:
                out_D = out_D + experts.down_bias_LD[choice]
            y_D = y_D + weight * out_D
        sums.append(y_D)
    return torch.stack(sums) if sums else arrived.rows_RD * 1.0


def assert_equal_to_the_loop(experts: Experts, arrived: Arrived) -> None:
    """Values, and the gradients of tokens, weights and parameters."""
    leaves = [arrived.rows_RD, arrived.weights_RK, *experts.parameters()]
    upstream = random(len(arrived.rows_RD), DIM, seed=3)
    results = []
    for y_RD in (experts(arrived), plain_loop(experts, arrived)):
        results.append([y_RD, *torch.autograd.grad(y_RD, leaves, upstream, allow_unused=True, materialize_grads=True)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, HELD), min_size=2, max_size=2), max_size=7), st.data())
def test_any_choices(rows: list[list[int]], data: st.DataObject) -> None:
    """Also rows without an expert here, experts without a row, and nothing at all."""
    experts = experts_of(data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.booleans()))
    assert_equal_to_the_loop(experts, arrived_of(rows))


CHOICES = {
    "all busy": [[0, 1], [1, 2], [2, 0], [0, 3]],
    "one expert without tokens": [[0, 2], [2, 0], [0, 3]],
    "all tokens to the last": [[2, 3], [3, 2]],
    "nothing kept": [[3, 3], [3, 3]],
    "no tokens": [],
}


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
@pytest.mark.parametrize("rows", CHOICES.values(), ids=CHOICES.keys())
def test_given_choices(activation: Activation, biased: bool, rows: list[list[int]]) -> None:
    assert_equal_to_the_loop(experts_of(activation, biased), arrived_of(rows))


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_an_expert_without_tokens_gets_gradients_of_zeros(activation: Activation, biased: bool) -> None:
    experts, arrived = experts_of(activation, biased), arrived_of(CHOICES["one expert without tokens"])
    experts(arrived).square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad[1].any(), name
        assert parameter.grad[0].any(), name
        assert parameter.grad[2].any(), name


@EACH_ACTIVATION
def test_a_weight_multiplies_the_whole_expert_with_its_bias(activation: Activation) -> None:
    """Twice the weights are twice the sum, and the sum over experts is that of each one alone."""
    experts, arrived = experts_of(activation, biased=True), arrived_of([[0, 1], [2, 1]])
    once_RD = experts(arrived)
    twice = Arrived(arrived.rows_RD, arrived.experts_RK, 2 * arrived.weights_RK, arrived.num_assignments, None)
    assert torch.allclose(experts(twice), 2 * once_RD, rtol=1e-12)
    alone = [
        experts(Arrived(arrived.rows_RD, arrived.experts_RK[:, k : k + 1], arrived.weights_RK[:, k : k + 1], 2, None))
        for k in range(2)
    ]
    assert torch.allclose(alone[0] + alone[1], once_RD, rtol=0, atol=1e-12)


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_places_filled_with_zeros_come_to_nothing(activation: Activation, biased: bool) -> None:
    """As buffers of fixed size bring them: with a bias the expert's answer to zeros is not zero, but its weight is."""
    experts, busy = experts_of(activation, biased), arrived_of([[0], [1], [2]])
    padded = Arrived(
        torch.cat([busy.rows_RD, torch.zeros(4, DIM, dtype=torch.float64)]),
        torch.cat([busy.experts_RK, torch.tensor([[0], [0], [1], [2]])]),
        torch.cat([busy.weights_RK, torch.zeros(4, 1, dtype=torch.float64)]),
        num_assignments=7,
        journey=None,
    )
    sums_RD = experts(padded)
    assert not sums_RD[3:].any()
    assert torch.equal(sums_RD[:3], experts(busy))
    gradients = [torch.autograd.grad(experts(a)[:3].square().sum(), list(experts.parameters())) for a in (padded, busy)]
    for with_padding, without in zip(*gradients, strict=True):
        assert torch.allclose(with_padding, without, rtol=1e-12, atol=1e-14)  # sums of more terms, in another order


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_bf16_rows_meet_fp32_weights(activation: Activation, biased: bool) -> None:
    experts, arrived = experts_of(activation, biased, torch.float32), arrived_of(CHOICES["all busy"], torch.bfloat16)
    y_RD = experts(arrived)
    assert y_RD.dtype == torch.bfloat16
    y_RD.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    exact = Arrived(arrived.rows_RD.double(), arrived.experts_RK, arrived.weights_RK, arrived.num_assignments, None)
    expected_RD = plain_loop(experts.double(), exact)
    assert (y_RD.double() - expected_RD).abs().max() <= 2.0**-5 * expected_RD.abs().max()


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_shapes_and_roles(activation: Activation, biased: bool) -> None:
    experts = experts_of(activation, biased)
    inner = 2 * HIDDEN if activation in GATED else HIDDEN
    expected = {"gate_up_LDF2": (HELD, DIM, inner), "down_LFD": (HELD, HIDDEN, DIM)}
    biases = {"gate_up_bias_LF2": (HELD, inner), "down_bias_LD": (HELD, DIM)}
    expected |= biases if biased else {}
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == expected
    for name, role in roles_of(experts).items():
        assert (role.kind, role.experts) == (Kind.EXPERT, range(4, 7)), name
    initialise(experts, seed=0)
    assert all((name in biases) == (not parameter.any()) for name, parameter in experts.named_parameters())
