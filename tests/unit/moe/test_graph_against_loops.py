"""Graph layers, vectorised, against the double loop of their formulas: values and all gradients, fp64."""

import pytest
import torch
from graph_samples import (
    ADJACENCIES,
    DIM,
    NORMALIZES,
    SIMILARITIES,
    assert_close,
    conv_of,
    graphs,
    plain_conv,
    random,
    results_of,
)

from moe_train.config.graph import GraphConfig
from moe_train.moe.graph import conv as conv_module
from moe_train.moe.graph.conv import GraphConv
from moe_train.moe.graph.reference import conv_one_by_one

EACH_KIND = [
    pytest.mark.parametrize("adjacency", ADJACENCIES),
    pytest.mark.parametrize("similarity", SIMILARITIES),
    pytest.mark.parametrize("normalize", NORMALIZES),
]
SIZES = (1, 2, 4, 5)


def of_each_kind(test):
    for mark in EACH_KIND:
        test = mark(test)
    return test


@pytest.fixture(params=[False, True], ids=["by products", "gathered"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to sum the messages of few sources."""
    monkeypatch.setattr(conv_module, "GATHER_UP_TO", 100 if request.param else 0)


@of_each_kind
@pytest.mark.usefixtures("ways")
def test_vectorised_is_the_double_loop(adjacency: str, similarity: str, normalize: str) -> None:
    """Self-edges or none, all sources or the strongest, one expert or several."""
    seen = 0
    for num_experts in SIZES:
        for graph in graphs(num_experts, adjacency=adjacency, similarity=similarity, normalize=normalize):
            conv, h_TED = conv_of(num_experts, graph), random(2, num_experts, DIM)
            parameters = list(conv.parameters())
            found = results_of(lambda h_TED, conv=conv: conv(h_TED)[0], h_TED, parameters)
            loop = results_of(lambda h_TED, conv=conv: conv_one_by_one(conv, h_TED), h_TED, parameters)
            assert_close(found, loop, (num_experts, graph))
            seen += 1
    assert seen >= 2 * len(SIZES)


@of_each_kind
def test_the_reference_is_the_formulas_number_by_number(adjacency: str, similarity: str, normalize: str) -> None:
    """Written once more, from what the configuration promises: the reference shares modules with the fast path."""
    for graph in graphs(4, adjacency=adjacency, similarity=similarity, normalize=normalize):
        conv, h_TED = conv_of(4, graph), random(1, 4, DIM)
        parameters = list(conv.parameters())
        reference = results_of(lambda h_TED, conv=conv: conv_one_by_one(conv, h_TED), h_TED, parameters)
        loop = results_of(lambda h_TED, conv=conv: plain_conv(conv, h_TED[0]).unsqueeze(0), h_TED, parameters)
        assert_close(reference, loop, graph)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_both_ways_to_sum_few_messages_agree(similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_experts in (2, 4, 5):
        for graph in graphs(num_experts, similarity=similarity):
            conv, h_TED = conv_of(num_experts, graph), random(3, num_experts, DIM)
            results = []
            for limit in (0, num_experts):
                monkeypatch.setattr(conv_module, "GATHER_UP_TO", limit)
                results.append(results_of(lambda h_TED, conv=conv: conv(h_TED)[0], h_TED, list(conv.parameters())))
            assert_close(*results, graph)


def test_a_message_changes_what_is_compared() -> None:
    """Or the comparisons above would not see the messages at all."""
    graph, h_TED = GraphConfig(), random(2, 4, DIM)
    conv = conv_of(4, graph)
    before_TED = conv(h_TED)[0].detach()
    with torch.no_grad():
        conv.messages.adjacency.logits_EE[1, 2] += 0.1
    moved_E = (conv(h_TED)[0] - before_TED).abs().amax(dim=(0, 2)) > 1e-6
    assert moved_E.tolist() == [False, True, False, False]


@of_each_kind
@pytest.mark.usefixtures("ways")
def test_bf16_is_near(adjacency: str, similarity: str, normalize: str) -> None:
    """Activations in bf16, weights in fp32: gradients arrive in fp32 and are finite."""
    for graph in graphs(4, adjacency=adjacency, similarity=similarity, normalize=normalize):
        conv, h_TED = conv_of(4, graph), random(5, 4, DIM)
        exact_TED, _ = conv(h_TED)
        single = conv.to(torch.float32)
        near_TED, _ = single(h_TED.bfloat16())
        assert near_TED.dtype == torch.bfloat16
        assert (near_TED.double() - exact_TED).abs().max() < 2.0**-5 * exact_TED.abs().max(), graph
        near_TED.float().square().sum().backward()
        assert_finite_gradients(single)


def assert_finite_gradients(conv: GraphConv) -> None:
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
