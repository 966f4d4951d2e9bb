"""Poolings, combiners and their LayerNorm: against loops, against torch, and what they start with."""

import pytest
import torch
from graph_samples import COMBINERS, DIM, POOLINGS, assert_close, coupling_of, plain_combiner, plain_pooling, random
from torch import nn
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.models.initialise import initialise
from moe_train.moe.graph.coupling import Coupling
from moe_train.moe.modules import LayerNorm, RMSNorm, build_norm
from moe_train.moe.roles import roles_of

POOLED = GraphConfig(layers=0)


def gradients_of(y: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, random(*y.shape, seed=3))]


@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_is_its_loop(kind: str, num_experts: int) -> None:
    coupling = coupling_of(num_experts, POOLED.model_copy(update={"pooling": kind}))
    h_TED = random(3, num_experts, DIM).requires_grad_()
    inputs = [h_TED, *coupling.pooling.parameters()]
    assert len(inputs) == (1 if kind == "mean" else 2)
    loop_TD = torch.stack([plain_pooling(coupling, h_ED) for h_ED in h_TED])
    assert_close(gradients_of(coupling.pooling(h_TED), *inputs), gradients_of(loop_TD, *inputs))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("kind", COMBINERS)
def test_combiner_is_its_loop(kind: str, norm: str) -> None:
    coupling = coupling_of(3, POOLED.model_copy(update={"combiner": kind}), norm)
    h_TED = random(3, 3, DIM).requires_grad_()
    inputs = [h_TED, *coupling.parameters()]
    expected = {"none": 0, "linear": 2, "gelu_norm": 3 if norm == "rms" else 4}
    assert len(inputs) == 1 + expected[kind]
    loop_TD = torch.stack([plain_combiner(coupling, y_D) for y_D in h_TED.mean(dim=1)])
    assert_close(gradients_of(coupling(h_TED).y_TD, *inputs), gradients_of(loop_TD, *inputs))


def test_what_poolings_prefer() -> None:
    """The expert with the largest weight, and the one that the query is like."""
    h_TED = 10.0 * torch.eye(DIM, dtype=torch.float64).unsqueeze(0)
    weighted = coupling_of(DIM, GraphConfig(layers=0, pooling="weighted"))
    attentive = coupling_of(DIM, GraphConfig(layers=0, pooling="attention"))
    with torch.no_grad():
        weighted.pooling.logits_E.copy_(torch.tensor([0.0, 50.0, 0.0]))
        attentive.pooling.query_D.copy_(torch.tensor([0.0, 0.0, 50.0]))
    assert_close([weighted(h_TED).y_TD], [h_TED[:, 1]])
    assert_close([attentive(h_TED).y_TD], [h_TED[:, 2]])


def test_learned_weights_start_as_the_mean() -> None:
    coupling, h_TED = coupling_of(4, GraphConfig(layers=0, pooling="weighted")), random(3, 4, DIM)
    initialise(coupling, seed=0)
    assert_close([coupling(h_TED).y_TD], [h_TED.mean(dim=1)])


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bf16_in_bf16_out(pooling: str, combiner: str) -> None:
    """With fp32 weights."""
    graph = GraphConfig(pooling=pooling, combiner=combiner)
    coupling, h_TED = coupling_of(4, graph), random(6, 4, DIM)
    exact_TD = coupling(h_TED).y_TD
    near_TD = coupling.float()(h_TED.bfloat16()).y_TD
    assert near_TD.dtype == torch.bfloat16
    assert (near_TD.double() - exact_TD).abs().max() < 2.0**-4 * exact_TD.abs().max()


def test_the_standard_deviations_of_the_combiner() -> None:
    """Without a norm after it, it writes into the residual stream."""
    for combiner, std in (("linear", 1.0), ("gelu_norm", 0.02)):
        coupling: Coupling = coupling_of(2, POOLED.model_copy(update={"combiner": combiner}))
        assert roles_of(coupling)["combiner.map.weight"].std == std


def test_layer_norm_is_that_of_torch_and_of_its_formula() -> None:
    ours, theirs = build_norm("layer", 5, 1e-3), nn.LayerNorm(5, eps=1e-3)
    assert isinstance(ours, LayerNorm)
    assert isinstance(build_norm("rms", 5, 1e-3), RMSNorm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for place, (a, b) in enumerate(zip(ours.double().parameters(), theirs.double().parameters(), strict=True)):
            a.copy_(random(5, seed=place))
            b.copy_(a)
    x_BSD = (3.0 * random(2, 4, 5) + 1.0).requires_grad_()
    found = gradients_of(ours(x_BSD), x_BSD, *ours.parameters())
    assert_close(found, gradients_of(theirs(x_BSD), x_BSD, *theirs.parameters()))
    centred_BSD = x_BSD - x_BSD.mean(dim=-1, keepdim=True)
    scale_BS1 = (centred_BSD.square().mean(dim=-1, keepdim=True) + 1e-3).rsqrt()
    loop = gradients_of(centred_BSD * scale_BS1 * ours.weight + ours.bias, x_BSD, *ours.parameters())
    assert_close(found, loop)


def test_layer_norm_starts_as_no_more_than_a_norm_and_is_precise() -> None:
    norm = LayerNorm(64, 1e-5)
    initialise(norm, seed=0)
    assert norm.weight.eq(1.0).all()
    assert not norm.bias.any()
    x_TD = 100.0 + random(3, 64)  # a large common part, in which bf16 would lose the rest
    rounded_TD = x_TD.bfloat16()
    y_TD = norm(rounded_TD)
    assert y_TD.dtype == torch.bfloat16
    expected_TD = F.layer_norm(rounded_TD.double(), (64,), eps=1e-5)
    assert (y_TD.double() - expected_TD).abs().max() <= 2.0**-8 * expected_TD.abs().max()
