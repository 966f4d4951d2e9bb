"""What is written down of a layer of dense experts, against numbers worked out by hand; and the loss for variety."""

import math

import pytest
import torch
from graph_samples import DIM, assert_close, coupling_of, filled, random
from torch import Tensor

from moe_train.config.graph import GraphConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.dense_exchange import LocalDenseExchange
from moe_train.moe.experts import DenseExperts
from moe_train.moe.graph.conv import Messages
from moe_train.moe.graph.coupling import Coupled
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.graph.record import GraphRecord, diversity, effective_rank

SILENT = Coupled(torch.zeros(0), ())


def record_of(added_TED: Tensor, coupled: Coupled = SILENT, valid: list[bool] | None = None) -> GraphRecord:
    valid_T = torch.tensor([True] * len(added_TED) if valid is None else valid)
    return GraphRecord.of(added_TED, coupled, valid_T, diversity(1.0))


def layer_of(num_experts: int = 4, orthogonality: float = 0.5, **graph: object) -> GraphLayer:
    config = GraphConfig(orthogonality=orthogonality, **graph)
    experts = filled(DenseExperts(DIM, 4, range(num_experts), 1.0, 1.0), seed=7)
    return GraphLayer(config, LocalDenseExchange(num_experts), experts, coupling_of(num_experts, config))


def test_cosines_by_hand() -> None:
    """At right angles, opposed, and at 45 degrees; the length means nothing."""
    added_TED = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], [[1.0, 0.0], [-4.0, 0.0], [0.0, 0.1]]])
    record, half = record_of(added_TED.double()), math.sqrt(0.5)
    figures = record.figures()
    expected_EE = torch.tensor([[2.0, -1.0, half], [-1.0, 2.0, half], [half, half, 2.0]], dtype=torch.float64) / 2
    assert torch.allclose(torch.tensor(figures["cosines"], dtype=torch.float64), expected_EE, rtol=1e-12)
    assert figures["similarity"] == pytest.approx((-0.5 + half) / 3, rel=1e-12)
    squares = (0.0 + 2 * 0.5) / 3 + 1.0 / 3
    assert record.statistics[0].item() == pytest.approx(squares, rel=1e-12)
    assert (figures["message_strength"], figures["message_norm"]) == ([], [])


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_equal_experts_have_rank_one_and_orthogonal_ones_all(num_experts: int) -> None:
    same_TED = random(5, 1, 6).expand(5, num_experts, 6)
    figures = record_of(same_TED).figures()
    assert figures["effective_rank"] == pytest.approx(1.0, abs=1e-6)
    assert figures["similarity"] == pytest.approx(1.0 if num_experts > 1 else 0.0, abs=1e-12)
    axes_TED = torch.eye(6, dtype=torch.float64)[:num_experts].expand(5, -1, -1) * random(5, num_experts, 1).exp()
    figures = record_of(axes_TED).figures()
    assert figures["effective_rank"] == pytest.approx(num_experts, rel=1e-12)
    assert figures["similarity"] == pytest.approx(0.0, abs=1e-12)


def test_effective_rank_by_hand() -> None:
    """Eigenvalues 1 + c and 1 - c of two experts with cosine c."""
    shares = (0.8, 0.2)
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)) == pytest.approx(
        expected, rel=1e-12
    )
    two_groups_EE = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).double()
    assert effective_rank(two_groups_EE) == pytest.approx(2.0, rel=1e-6)


def test_messages_by_hand() -> None:
    """Per graph layer: mean strength of each edge, and norm received relative to norm sent, over both experts."""
    strength_TEE = torch.tensor([[[0.0, 1.0], [3.0, 0.0]], [[0.0, 2.0], [5.0, 0.0]]]).double()
    received_TED = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [6.0, 8.0]]]).double()
    sent_TED = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 4.0]]]).double()
    first = Messages(sent_TED, received_TED, strength_TEE)
    coupled = Coupled(sent_TED[:, 0], (first, Messages(sent_TED, 2 * received_TED, 3 * strength_TEE)))
    figures = record_of(sent_TED, coupled).figures()
    assert figures["message_strength"] == [[[0.0, 1.5], [4.0, 0.0]], [[0.0, 4.5], [12.0, 0.0]]]
    assert figures["message_norm"] == pytest.approx([(5 + 0 + 1 + 10) / (1 + 1 + 2 + 4), 2 * 16 / 8], rel=1e-12)
    # Of the first token alone, the second being padding.
    figures = record_of(sent_TED, coupled, [True, False]).figures()
    assert figures["message_strength"] == [[[0.0, 1.0], [3.0, 0.0]], [[0.0, 3.0], [9.0, 0.0]]]
    assert figures["message_norm"] == pytest.approx([2.5, 5.0], rel=1e-12)


def test_figures_are_those_of_a_loop_over_the_layers_own_numbers() -> None:
    layer, x_BSD = layer_of(), random(2, 3, DIM)
    figures = layer(x_BSD).record.figures()
    h_TED = layer.experts(x_BSD).flatten(0, 1)
    coupled = layer.coupling(h_TED)
    pairs = [torch.cosine_similarity(h_TED[:, i], h_TED[:, j], dim=1).mean() for i in range(4) for j in range(4)]
    assert torch.allclose(
        torch.tensor(figures["cosines"], dtype=torch.float64).flatten(), torch.stack(pairs), rtol=1e-12
    )
    off_diagonal = [pair.item() for place, pair in enumerate(pairs) if place % 5]
    assert figures["similarity"] == pytest.approx(sum(off_diagonal) / 12, rel=1e-12)
    for layer_place, told in enumerate(coupled.messages):
        strength_EE = torch.tensor(figures["message_strength"][layer_place], dtype=torch.float64)
        assert torch.allclose(strength_EE, told.strength_TEE.mean(dim=0), rtol=1e-12)
        norm = told.received_TED.norm(dim=2).mean() / told.sent_TED.norm(dim=2).mean()
        assert figures["message_norm"][layer_place] == pytest.approx(norm.item(), rel=1e-12)


def test_a_whole_block_counts_without_the_stream_it_passes_on() -> None:
    """Blocks that add nothing but different noise look alike if the common input counts."""
    layer, x_BSD = layer_of(expert="block"), 100.0 * random(2, 3, DIM)
    noise = random(2, 3, 4, DIM, seed=5)
    layer.experts = torch.nn.Module()
    layer.experts.forward = lambda x_RSD, rotary: x_RSD.unsqueeze(2) + noise
    found = layer(x_BSD).record.figures()
    assert_close([torch.tensor(found["cosines"])], [torch.tensor(record_of(noise.flatten(0, 1)).figures()["cosines"])])
    assert found["similarity"] < 0.5


def test_padding_counts_nowhere() -> None:
    """Whatever stands there, zeros included."""
    layer, x_BSD = layer_of(), random(2, 4, DIM)
    valid_BS = torch.tensor([[True, True, True, False], [True, False, False, False]])
    ids_BS = torch.zeros(2, 4, dtype=torch.int64)
    records = []
    for scale in (0.0, 1.0, 1e3):
        filled_BSD = torch.where(valid_BS.unsqueeze(2), x_BSD, scale * x_BSD)
        records.append(layer(filled_BSD, RoutingContext.of(ids_BS, valid_BS)).record)
    kept_1SD = x_BSD.flatten(0, 1)[valid_BS.flatten()].unsqueeze(0)
    alone = layer(kept_1SD).record
    assert alone.tokens.item() == 4
    for record in records:
        assert_close([tensor.double() for tensor in record.tensors()], [tensor.double() for tensor in alone.tensors()])


def test_nothing_but_padding_is_no_division_by_zero() -> None:
    layer = layer_of()
    context = RoutingContext.of(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
    figures = layer(random(1, 2, DIM), context).record.figures()
    assert figures["similarity"] == 0.0
    assert all(math.isfinite(value) for value in (figures["effective_rank"], *figures["message_norm"]))


def test_records_of_parts_add_up_to_that_of_the_whole() -> None:
    layer, x_BSD = layer_of(), random(4, 3, DIM)
    whole = layer(x_BSD).record
    parts = layer(x_BSD[:1]).record + layer(x_BSD[1:]).record
    assert parts.tokens.item() == whole.tokens.item() == 12
    assert_close([tensor.double() for tensor in parts.tensors()], [tensor.double() for tensor in whole.tensors()])
    again = GraphRecord.from_tensors(whole.tensors())
    assert all(a is b for a, b in zip(again.tensors(), whole.tensors(), strict=True))
    assert not any(tensor.requires_grad for tensor in whole.detached().tensors())
    dtypes = {name: getattr(whole, name).dtype for name in GraphRecord.sum_names()}
    assert dtypes.pop("tokens") == torch.int64
    assert set(dtypes.values()) == {torch.float64}


def test_adjacency_and_its_entropy_by_hand() -> None:
    """ln 3 for three equal sources, 0 for one, something between for unequal ones; row by row, layer by layer."""
    layer = layer_of(layers=2, normalize="count")
    first_EE, second_EE = (conv.messages.adjacency.logits_EE for conv in layer.coupling.convs)
    with torch.no_grad():
        first_EE.fill_(0.3)
        second_EE.fill_(0.3)
    assert layer.figures()["adjacency_entropy"] == pytest.approx(math.log(3), rel=1e-12)
    weight = 1 / (1 + math.exp(-0.3)) / 3
    for adjacency_EE in layer.figures()["adjacency"]:
        for i, row in enumerate(adjacency_EE):
            assert row == pytest.approx([0.0 if i == j else weight for j in range(4)], rel=1e-12)
    with torch.no_grad():
        second_EE.fill_(-800.0)
        second_EE[:, 0] = 0.0
        second_EE[0, 1] = 0.0
    assert layer.figures()["adjacency_entropy"] == pytest.approx(math.log(3) / 2, rel=1e-12)
    with torch.no_grad():  # expert 3 of the second layer: weights 1/2 and 1/4
        second_EE[3, 1] = -math.log(3)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert layer.figures()["adjacency_entropy"] == pytest.approx((4 * math.log(3) + entropy) / 8, rel=1e-12)
    assert layer_of(max_neighbors=1).figures()["adjacency_entropy"] == 0.0


def test_without_messages_there_is_no_adjacency() -> None:
    for silent in ({"layers": 0}, {"max_neighbors": 0}):
        assert layer_of(**silent).figures() == {}
        figures = layer_of(**silent)(random(1, 2, DIM)).record.figures()
        assert (figures["message_strength"], figures["message_norm"]) == ([], [])
    alone = layer_of(num_experts=1).figures()
    assert alone == {"adjacency": [[[0.0]], [[0.0]]], "adjacency_entropy": 0.0}


def test_the_loss_is_the_mean_squared_cosine() -> None:
    """Of each token, summed over tokens: 1 for equal experts, 0 for orthogonal ones, times its weight."""
    loss_of = diversity(0.25)
    for added_TED, loss in (
        (random(5, 1, 6).expand(5, 4, 6), 5.0),
        (torch.eye(6, dtype=torch.float64)[:4].expand(5, 4, 6), 0.0),
        (random(5, 1, 6), 0.0),
    ):
        record = GraphRecord.of(added_TED, SILENT, torch.ones(5, dtype=torch.bool), loss_of)
        assert loss_of.values(record.statistics)["orthogonality_loss"].item() == pytest.approx(loss, abs=1e-12)
        assert loss_of.share(record, ()).item() == pytest.approx(0.25 * loss, abs=1e-12)
    added_TED = random(5, 4, 6)
    record = record_of(added_TED)
    expected = sum(
        torch.cosine_similarity(added_TED[:, i], added_TED[:, j], dim=1).square().sum()
        for i in range(4)
        for j in range(4)
        if i != j
    )
    assert record.statistics[0].item() == pytest.approx(expected.item() / 12, rel=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_a_loss_with_a_weight_has_a_gradient(recompute: bool) -> None:
    x_BSD = random(2, 3, DIM).requires_grad_()
    values = []
    for weight in (0.0, 0.5):
        layer = layer_of(orthogonality=weight, recompute=recompute)
        record = layer(x_BSD).record
        assert record.statistics[0].requires_grad == (weight > 0.0)
        assert not any(getattr(record, name).requires_grad for name in GraphRecord.sum_names())
        assert not layer.balance.needs_totals
        values.append(record.statistics[0].item())
    assert values[0] == values[1] > 0.0


def test_its_gradient_is_that_of_the_formula_and_reaches_the_experts_alone() -> None:
    layer, x_BSD = layer_of(), random(2, 3, DIM)
    layer.balance.share(layer(x_BSD).record, ()).backward()
    assert all(parameter.grad is None for parameter in layer.coupling.parameters())
    h_TED = layer.experts(x_BSD).flatten(0, 1)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    squares = [torch.cosine_similarity(h_TED[:, i], h_TED[:, j], dim=1).square().sum() for i, j in pairs]
    parameters = list(layer.experts.parameters())
    expected = torch.autograd.grad(0.5 * sum(squares) / 12, parameters)
    assert_close([parameter.grad for parameter in parameters], expected)


def test_descending_on_it_makes_experts_different() -> None:
    layer, x_BSD = layer_of(), random(8, 4, DIM)
    with torch.no_grad():  # experts that are nearly alike
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1] + 0.1 * parameter)
    optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.05)
    seen = []
    for _ in range(30):
        record = layer(x_BSD).record
        figures = record.figures()
        seen.append((record.statistics[0].item() / 32, figures["similarity"], figures["effective_rank"]))
        optimizer.zero_grad()
        layer.balance.share(record, ()).backward()
        optimizer.step()
    (first, alike, rank), (last, less_alike, more_rank) = seen[0], seen[-1]
    assert alike > 0.8
    assert last < 0.7 * first
    assert less_alike < alike - 0.2
    assert more_rank > rank + 0.2
