"""Edges that vanish, that are left out, or that never were: what is then left of the messages."""

import pytest
import torch
from graph_samples import (
    ADJACENCIES,
    DIM,
    NORMALIZES,
    SIMILARITIES,
    assert_close,
    conv_of,
    coupling_of,
    graphs,
    random,
    results_of,
)
from torch import Tensor
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.moe.graph import conv as conv_module
from moe_train.moe.graph.adjacency import Adjacency
from moe_train.moe.graph.conv import GraphConv

SHUT = float("-inf")
INDEPENDENT = [
    ("sigmoid", normalize, shut) for normalize in NORMALIZES for shut in (-800.0, -1e30, SHUT)
] + [("softmax", normalize, SHUT) for normalize in NORMALIZES]  # fmt: skip
"""Sources that compete always share out the same sum, unless none of them takes part."""


@pytest.fixture(params=[0, 100], ids=["by products", "gathered"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to sum the messages of few sources."""
    monkeypatch.setattr(conv_module, "GATHER_UP_TO", request.param)


def with_logits(conv: GraphConv, logits_EE: Tensor) -> GraphConv:
    with torch.no_grad():
        conv.messages.adjacency.logits_EE.copy_(logits_EE)
    return conv


def without_messages(conv: GraphConv) -> GraphConv:
    """Each expert for itself, with the same own map; what is left of no message is the bias of its map."""
    _, num_experts = conv.messages.adjacency.logits_EE.shape
    alone = conv_of(num_experts, GraphConfig(max_neighbors=0, prenorm=conv.prenorm))
    with torch.no_grad():
        alone.own.weight.copy_(conv.own.weight)
        alone.own.bias.copy_(conv.own.bias + conv.messages.map.bias)
    return alone


@pytest.mark.parametrize(("adjacency", "normalize", "shut"), INDEPENDENT)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.usefixtures("ways")
def test_logits_to_minus_infinity_are_independent_experts(
    adjacency: str, normalize: str, shut: float, similarity: str
) -> None:
    """In values and in gradients, of which all are finite, and none reaches what no message depends on."""
    for graph in graphs(4, adjacency=adjacency, normalize=normalize, similarity=similarity):
        if graph.max_neighbors == 0:
            continue
        conv, h_TED = conv_of(4, graph), random(3, 4, DIM)
        with_logits(conv, torch.full((4, 4), shut))
        alone = without_messages(conv)
        names, parameters = zip(*conv.named_parameters(), strict=True)
        y_TED, *gradients = results_of(lambda h_TED, conv=conv: conv(h_TED)[0], h_TED, parameters)
        own = results_of(lambda h_TED, alone=alone: alone(h_TED)[0], h_TED, [alone.own.weight, alone.own.bias])
        found = dict(zip(["input", *names], gradients, strict=True))
        assert_close([y_TED, *(found[name] for name in ("input", "own.weight", "own.bias"))], own, graph)
        assert_close([found.pop("messages.map.bias")], [own[-1]], graph)
        assert not any(gradient.any() for name, gradient in found.items() if name.startswith("messages.")), graph


def test_a_whole_coupling_without_edges_pools_independent_experts() -> None:
    coupling, h_TED = coupling_of(4, GraphConfig(combiner="linear")), random(3, 4, DIM)
    alone = coupling_of(4, GraphConfig(combiner="linear", max_neighbors=0))
    with torch.no_grad():
        for silent, conv in zip(alone.convs, coupling.convs, strict=True):
            with_logits(conv, torch.full((4, 4), SHUT))
            silent.own.load_state_dict(without_messages(conv).own.state_dict())
        alone.combiner.load_state_dict(coupling.combiner.state_dict())
    assert_close([coupling(h_TED).y_TD], [alone(h_TED).y_TD])
    assert alone(h_TED).messages == ()
    assert alone.adjacencies().numel() == 0
    assert (coupling_of(4, GraphConfig(combiner="linear"))(h_TED).y_TD - alone(h_TED).y_TD).abs().max() > 0.1


def test_experts_alone_are_independent() -> None:
    """What one holds changes nothing of another."""
    conv, h_TED = conv_of(4, GraphConfig(max_neighbors=0)), random(3, 4, DIM)
    before_TED, messages = conv(h_TED)
    assert messages is None
    h_TED[:, 2] += 1.0
    moved_E = (conv(h_TED)[0] - before_TED).abs().amax(dim=(0, 2)) > 1e-6
    assert moved_E.tolist() == [False, False, True, False]


@pytest.mark.parametrize("adjacency", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("shut", [-800.0, SHUT])
def test_a_vanished_edge_is_none(adjacency: str, normalize: str, shut: float) -> None:
    """Other edges stay; all gradients are finite."""
    conv, h_TED = conv_of(3, GraphConfig(adjacency=adjacency, normalize=normalize)), random(2, 3, DIM)
    with torch.no_grad():
        conv.messages.adjacency.logits_EE[0, 1] = shut
    before_TED, messages = conv(h_TED)
    assert not messages.strength_TEE[:, 0, 1].any()
    assert messages.strength_TEE[:, 0, 2].all()
    before_TED.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in conv.parameters())
    assert not conv.messages.adjacency.logits_EE.grad[0, 1].any()
    changed_TED = h_TED.clone()
    changed_TED[:, 1] += 1.0
    assert torch.equal(conv(changed_TED)[0][:, 0], before_TED[:, 0])


@pytest.mark.parametrize("adjacency", ["sigmoid", "softmax"])
@pytest.mark.usefixtures("ways")
def test_too_few_open_edges_do_not_open_impossible_ones(adjacency: str) -> None:
    """Of what is shut the first place would be chosen, which is the expert itself: it stays out."""
    graph = GraphConfig(adjacency=adjacency, max_neighbors=1)
    logits_EE = torch.tensor([[5.0, SHUT, SHUT], [0.0, 5.0, SHUT], [SHUT, SHUT, 5.0]])
    conv = with_logits(conv_of(3, graph), logits_EE)
    expected_EE = torch.tensor([[0.0, 0.0, 0.0], [0.5 if adjacency == "sigmoid" else 1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(conv.messages.adjacency(torch.device("cpu")), expected_EE.double())
    y_TED, messages = conv(random(2, 3, DIM))
    assert not messages.received_TED[:, [0, 2]].any()
    y_TED.sum().backward()
    assert conv.messages.adjacency.logits_EE.grad.isfinite().all()


@pytest.mark.parametrize("self_edges", [False, True])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_one_expert_alone(self_edges: bool, similarity: str) -> None:
    """No sources, or itself: every parameter has a finite gradient."""
    for graph in graphs(1, self_edges=self_edges, similarity=similarity):
        conv, h_TED = conv_of(1, graph), random(3, 1, DIM).requires_grad_()
        y_TED, messages = conv(h_TED)
        if not self_edges and messages is not None:
            assert not messages.received_TED.any()
            assert not conv.messages.adjacency(h_TED.device).any()
            z_TED = conv.own(conv.read(h_TED)) + conv.messages.map.bias
            assert_close([y_TED], [h_TED + F.gelu(z_TED)])
        y_TED.square().sum().backward()
        for name, parameter in [("input", h_TED), *conv.named_parameters()]:
            assert parameter.grad is not None, (graph, name)
            assert parameter.grad.isfinite().all(), (graph, name)


@pytest.mark.parametrize("adjacency", ["sigmoid", "softmax"])
@pytest.mark.parametrize("self_edges", [False, True])
def test_of_equal_logits_the_lowest_index_wins(adjacency: str, self_edges: bool) -> None:
    graph = GraphConfig(adjacency=adjacency, self_edges=self_edges, max_neighbors=2)
    conv = with_logits(conv_of(4, graph), torch.zeros(4, 4))
    expected = [[0, 1]] * 4 if self_edges else [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert conv.messages.adjacency.sources().tolist() == expected
    edges_EE = conv.messages.adjacency.edges(torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in edges_EE] == expected


@pytest.mark.parametrize("adjacency", ["sigmoid", "softmax"])
@pytest.mark.usefixtures("ways")
def test_the_choice_follows_the_logits(adjacency: str) -> None:
    """Edges left out weigh nothing and learn nothing; the strongest do, and others in their place when they change."""
    conv, h_TED = conv_of(4, GraphConfig(adjacency=adjacency, normalize="count", max_neighbors=2)), random(3, 4, DIM)
    seen = []
    for shift in (0, 1):
        logits_EE = with_logits(conv, random(4, 4, seed=5).roll(shift, dims=1)).messages.adjacency.logits_EE
        y_TED, messages = conv(h_TED)
        (gradient_EE,) = torch.autograd.grad(y_TED.square().sum(), logits_EE)
        chosen_EE = torch.zeros(4, 4, dtype=torch.bool)
        for i in range(4):
            others = sorted((j for j in range(4) if j != i), key=lambda j, i=i: -logits_EE[i, j].item())
            chosen_EE[i, others[:2]] = True
        assert torch.equal(gradient_EE != 0.0, chosen_EE)
        assert torch.equal((messages.strength_TEE != 0.0).all(dim=0), chosen_EE)
        assert torch.equal((messages.strength_TEE != 0.0).any(dim=0), chosen_EE)
        seen.append(chosen_EE)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_as_many_neighbors_as_there_are_is_no_limit(adjacency: str) -> None:
    for self_edges in (False, True):
        graph = GraphConfig(adjacency=adjacency, self_edges=self_edges)
        limited = graph.model_copy(update={"max_neighbors": 4 if self_edges else 3})
        first, second = (conv_of(4, config)(random(3, 4, DIM))[0] for config in (graph, limited))
        assert torch.equal(first, second)


def test_weights_by_hand() -> None:
    """Two experts listen to two sources each: what the words of the configuration say."""
    logits_EE = torch.tensor([[9.0, 0.0, 3.0], [0.0, 9.0, 0.0], [1.0, 2.0, 9.0]], dtype=torch.float64)
    sigmoid, e = torch.sigmoid(logits_EE), torch.e
    expected = {
        ("sigmoid", "none"): [sigmoid[0, 1], sigmoid[0, 2]],
        ("sigmoid", "count"): [sigmoid[0, 1] / 2, sigmoid[0, 2] / 2],
        ("sigmoid", "degree"): [0.5 / (0.5 + sigmoid[0, 2]), sigmoid[0, 2] / (0.5 + sigmoid[0, 2])],
        ("softmax", "none"): [1 / (1 + e**3), e**3 / (1 + e**3)],
        ("softmax", "count"): [0.5 / (1 + e**3), 0.5 * e**3 / (1 + e**3)],
        ("none", "none"): [1.0, 1.0],
        ("none", "count"): [0.5, 0.5],
        ("none", "degree"): [0.5, 0.5],
    }
    for (adjacency, normalize), (first, second) in expected.items():
        graph = Adjacency(3, GraphConfig(adjacency=adjacency, normalize=normalize)).double()
        if graph.logits_EE is not None:
            graph.logits_EE.data = logits_EE
        found_E = graph(torch.device("cpu"), torch.float64)[0]
        wanted_E = torch.tensor([0.0, float(first), float(second)], dtype=torch.float64)
        assert torch.allclose(found_E, wanted_E, rtol=1e-14, atol=0), (adjacency, normalize)


def test_a_vector_of_zeros_is_like_no_other() -> None:
    """Nor does it have a direction to learn: the gradient is finite and not the inverse of a small number."""
    conv, h_TED = conv_of(3, GraphConfig(similarity="cosine")), random(2, 3, DIM)
    h_TED[:, 1] = 0.0
    h_TED.requires_grad_()
    y_TED, messages = conv(h_TED)
    assert not messages.strength_TEE[:, 1].any()
    assert not messages.strength_TEE[:, :, 1].any()
    y_TED.sum().backward()
    assert h_TED.grad.abs().max() < 100.0
    for parameter in conv.parameters():
        assert parameter.grad.isfinite().all()
