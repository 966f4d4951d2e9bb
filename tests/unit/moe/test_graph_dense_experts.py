"""Experts to which every token comes: a loop over them, and what sparse experts do when every token chooses all."""

from typing import get_args

import pytest
import torch
from graph_samples import assert_close, filled, random
from torch import Tensor

from moe_train.config.model import Activation
from moe_train.models.initialise import initialise
from moe_train.moe.exchange import Arrived
from moe_train.moe.experts import DenseExperts, Experts
from moe_train.moe.roles import Kind, roles_of
from moe_train.ops.activation import activate

DIM, HIDDEN, HELD = 6, 4, 3
EACH_ACTIVATION = pytest.mark.parametrize("activation", get_args(Activation))
WITH_AND_WITHOUT_BIAS = pytest.mark.parametrize("biased", [False, True])


def experts_of(activation: Activation, biased: bool) -> DenseExperts:
    """Experts 4, 5 and 6 of some layer."""
    return filled(DenseExperts(DIM, HIDDEN, range(4, 4 + HELD), 1.0, 1.0, activation, biased))


def loop(experts: DenseExperts, x_RSD: Tensor) -> Tensor:
    """Token by token and expert by expert."""
    sequences = []
    for x_SD in x_RSD:
        for x_D in x_SD:
            for place in range(HELD):
                inner_F = x_D @ experts.gate_up_LDF2[place]
                if experts.gate_up_bias_LF2 is not None:
                    inner_F = inner_F + experts.gate_up_bias_LF2[place]
                y_D = activate(inner_F, experts.activation) @ experts.down_LFD[place]
                sequences.append(y_D if experts.down_bias_LD is None else y_D + experts.down_bias_LD[place])
    return torch.stack(sequences).view(*x_RSD.shape[:2], HELD, DIM)


def gradients_of(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, random(*y.shape, seed=3))]


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_they_are_a_loop_over_experts(activation: Activation, biased: bool) -> None:
    experts, x_RSD = experts_of(activation, biased), random(2, 3, DIM).requires_grad_()
    inputs = [x_RSD, *experts.parameters()]
    assert_close(gradients_of(experts(x_RSD), *inputs), gradients_of(loop(experts, x_RSD), *inputs))


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_their_sum_is_that_of_sparse_experts_whom_every_token_chooses(activation: Activation, biased: bool) -> None:
    """Each with weight 1. Both have the same parameters by the same names."""
    dense = experts_of(activation, biased)
    sparse = Experts(DIM, HIDDEN, range(4, 4 + HELD), 1.0, 1.0, activation, biased).double()
    sparse.load_state_dict(dense.state_dict())
    x_RSD = random(2, 3, DIM).requires_grad_()
    chosen_RK = torch.arange(HELD).expand(6, HELD)
    arrived = Arrived(x_RSD.flatten(0, 1), chosen_RK, torch.ones(6, HELD, dtype=torch.float64), 6 * HELD, None)
    expected = gradients_of(sparse(arrived).view_as(x_RSD), x_RSD, *sparse.parameters())
    assert_close(gradients_of(dense(x_RSD).sum(dim=2), x_RSD, *dense.parameters()), expected)


@EACH_ACTIVATION
@WITH_AND_WITHOUT_BIAS
def test_bf16_tokens_meet_fp32_weights(activation: Activation, biased: bool) -> None:
    experts, x_RSD = experts_of(activation, biased), random(2, 3, DIM).bfloat16()
    expected_RSLD = loop(experts, x_RSD.double())
    experts.float()
    y_RSLD = experts(x_RSD)
    assert y_RSLD.dtype == torch.bfloat16
    y_RSLD.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())
    assert (y_RSLD.double() - expected_RSLD).abs().max() <= 2.0**-5 * expected_RSLD.abs().max()


def test_shapes_roles_and_positions() -> None:
    experts = experts_of("swiglu", biased=True)
    assert experts(random(2, 3, DIM)).shape == (2, 3, HELD, DIM)
    assert experts(random(0, 3, DIM)).shape == (0, 3, HELD, DIM)
    for name, role in roles_of(experts).items():
        assert (role.kind, role.experts) == (Kind.EXPERT, range(4, 7)), name
    initialise(experts, seed=0)
    sparse = Experts(DIM, HIDDEN, range(4, 7), 1.0, 1.0, "swiglu", True).double()
    initialise(sparse, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(experts.parameters(), sparse.parameters(), strict=True))
