"""What must hold of the coupling of experts for every configuration, every number of experts and all their values."""

from typing import Any

import torch
from graph_samples import (
    ADJACENCIES,
    COMBINERS,
    DIM,
    NORMALIZES,
    POOLINGS,
    SIMILARITIES,
    coupling_of,
    is_possible,
    plain_coupling,
    random,
    results_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.graph import GraphConfig
from moe_train.moe.graph import conv as conv_module
from moe_train.moe.graph.coupling import Coupling

SIZES = st.sampled_from([1, 2, 4, 5])
SEEDS = st.integers(0, 10_000)


@st.composite
def couplings(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES, **fixed: Any) -> tuple[Coupling, GraphConfig]:
    """A coupling of any configuration that the rules allow, with random values for all parameters."""
    num_experts = draw(sizes)
    free = {
        "layers": st.integers(0, 2),
        "adjacency": st.sampled_from(ADJACENCIES),
        "self_edges": st.booleans(),
        "normalize": st.sampled_from(NORMALIZES),
        "similarity": st.sampled_from(SIMILARITIES),
        "max_neighbors": st.sampled_from([None, 0, 1, 2]),
        "pooling": st.sampled_from(POOLINGS),
        "combiner": st.sampled_from(COMBINERS),
    }
    graph = GraphConfig(**(fixed | {name: draw(values) for name, values in free.items() if name not in fixed}))
    assume(is_possible(num_experts, graph))
    norm = draw(st.sampled_from(["rms", "layer"]))
    return coupling_of(num_experts, graph, norm, seed=draw(SEEDS)), graph


@settings(max_examples=60, deadline=None)
@given(st.data(), SEEDS, st.booleans())
def test_the_coupling_is_a_loop_over_tokens_experts_and_numbers(data: st.DataObject, seed: int, gathered: bool) -> None:
    """Values, and the gradients of the experts' results and of every parameter, to 1e-12 in fp64."""
    num_experts = data.draw(SIZES)
    coupling, graph = data.draw(couplings(st.just(num_experts)))
    h_TED = random(2, num_experts, DIM, seed=seed)
    before, conv_module.GATHER_UP_TO = conv_module.GATHER_UP_TO, 100 if gathered else 0
    try:
        found = results_of(lambda h_TED: coupling(h_TED).y_TD, h_TED, list(coupling.parameters()))
    finally:
        conv_module.GATHER_UP_TO = before
    expected = results_of(lambda h_TED: plain_coupling(coupling, h_TED), h_TED, list(coupling.parameters()))
    assert_close_relatively(found, expected, graph)


def assert_close_relatively(found: list[Tensor], expected: list[Tensor], what: object) -> None:
    """To 1e-12 of the largest number: sums of messages may be large, and so are their gradients."""
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, (what, place)
        assert (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item()), (what, place)


@settings(max_examples=40, deadline=None)
@given(st.data(), SEEDS)
def test_the_order_of_experts_means_nothing(data: st.DataObject, seed: int) -> None:
    """With rows and columns of the graph, and the pooling's weights, in the same order."""
    num_experts = data.draw(st.sampled_from([2, 4, 5]))
    coupling, graph = data.draw(couplings(st.just(num_experts)))
    order = torch.tensor(data.draw(st.permutations(range(num_experts))))
    h_TED = random(3, num_experts, DIM, seed=seed)
    before = coupling(h_TED)
    permute(coupling, order)
    after = coupling(h_TED[:, order])
    assert_close_relatively([after.y_TD], [before.y_TD], graph)
    for told, earlier in zip(after.messages, before.messages, strict=True):
        assert_close_relatively([told.sent_TED], [earlier.sent_TED[:, order]], graph)
        assert_close_relatively([told.received_TED], [earlier.received_TED[:, order]], graph)
        assert_close_relatively([told.strength_TEE], [earlier.strength_TEE[:, order][:, :, order]], graph)


def permute(coupling: Coupling, order: Tensor) -> None:
    """Give every parameter that has an entry per expert the experts' new order."""
    with torch.no_grad():
        for name, parameter in coupling.named_parameters():
            if name.endswith("logits_EE"):
                parameter.copy_(parameter[order][:, order])
            elif name.endswith("logits_E"):
                parameter.copy_(parameter[order])


@settings(max_examples=40, deadline=None)
@given(st.data(), SEEDS)
def test_tokens_do_not_see_each_other(data: st.DataObject, seed: int) -> None:
    """All at once, or one at a time; and no token is changed by another."""
    num_experts = data.draw(SIZES)
    coupling, graph = data.draw(couplings(st.just(num_experts)))
    h_TED = random(4, num_experts, DIM, seed=seed)
    alone_TD = torch.cat([coupling(h_1ED).y_TD for h_1ED in h_TED.split(1)])
    assert_close_relatively([coupling(h_TED).y_TD], [alone_TD], graph)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.floats(-1e4, 1e4), SEEDS)
def test_everything_is_finite(data: st.DataObject, logit: float, seed: int) -> None:
    """In fp32, with edges as strong or weak as can be, and experts that hold nothing."""
    num_experts = data.draw(SIZES)
    coupling, graph = data.draw(couplings(st.just(num_experts)))
    coupling.float()
    for name, parameter in coupling.named_parameters():
        if name.endswith("logits_EE"):
            parameter.data.fill_(logit)
    h_TED = random(3, num_experts, DIM, seed=seed).float()
    h_TED[0, 0] = 0.0
    h_TED[1] = 0.0
    h_TED.requires_grad_()
    coupling(h_TED).y_TD.square().sum().backward()
    for parameter in [h_TED, *coupling.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), graph
        assert parameter.grad.abs().max() < 1e8, graph


def test_experts_in_another_order_than_their_graph_are_others() -> None:
    """Or the order would mean nothing because nothing did."""
    coupling, h_TED = coupling_of(4, GraphConfig()), random(3, 4, DIM)
    order = torch.tensor([1, 0, 2, 3])
    assert (coupling(h_TED[:, order]).y_TD - coupling(h_TED).y_TD).abs().max() > 1e-3
