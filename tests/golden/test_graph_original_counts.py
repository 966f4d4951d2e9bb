"""Sizes of the published graph-coupled models: five runs of the GNN-MoE project (phase 1), to the unit.

The closed form is written out by hand from what its layers are; the five totals are those that its runs state.
"""

import functools

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import count
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange

PUBLISHED = {
    (256, 4, 4, 2): 39_773_401,
    (384, 4, 4, 2): 70_055_129,
    (384, 4, 4, 1): 68_869_269,
    (384, 4, 4, 3): 71_240_989,
    (512, 4, 4, 2): 107_283_673,
}
"""Total by width D, experts E, layers L and graph layers G."""
SIZES = pytest.mark.parametrize(("dim", "experts", "layers", "graph_layers"), PUBLISHED)
VOCAB, LENGTH = 50_257, 128


@functools.cache
def original(*overrides: str) -> ModelConfig:
    return compose_config("train", TrainConfig, lambda config: [], ["model=graph_original", *overrides]).model


def of_size(dim: int, experts: int, layers: int, graph_layers: int) -> ModelConfig:
    """Heads are 64 wide, feed-forward networks four times as wide as the model."""
    return original(
        f"model.dim={dim}", f"model.heads={dim // 64}", f"model.ffn.expert_dim={4 * dim}", f"model.layers={layers}",
        f"model.ffn.num_experts={experts}", f"model.ffn.graph.layers={graph_layers}",
    )  # fmt: skip


def by_hand(dim: int, experts: int, layers: int, graph_layers: int) -> int:
    """The sum over the parts of the original."""
    queries_keys_values, out = 3 * dim**2 + 3 * dim, dim**2 + dim
    two_norms, network = 2 * 2 * dim, (4 * dim**2 + 4 * dim) + (4 * dim**2 + dim)
    block = queries_keys_values + out + two_norms + network
    graph_layer = 2 * (dim**2 + dim) + (2 * dim + 1) + experts**2
    combiner = dim**2 + dim + 2 * dim
    around = VOCAB * dim + LENGTH * dim + 2 * dim + (dim * VOCAB + VOCAB)
    return around + layers * (experts * block + graph_layers * graph_layer + combiner)


@SIZES
def test_the_count_of_the_configuration(dim: int, experts: int, layers: int, graph_layers: int) -> None:
    size = count(of_size(dim, experts, layers, graph_layers), VOCAB, LENGTH)
    assert size.total == PUBLISHED[dim, experts, layers, graph_layers] == by_hand(dim, experts, layers, graph_layers)
    assert size.active == size.total, "every token visits every expert"


@SIZES
def test_the_parameters_of_the_built_model(dim: int, experts: int, layers: int, graph_layers: int) -> None:
    config = of_size(dim, experts, layers, graph_layers)
    model = build_model(config, VOCAB, LocalExchange(experts), "fp32", torch.device("meta"))
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == PUBLISHED[dim, experts, layers, graph_layers]


@pytest.mark.parametrize("size", [(128, 1, 2, 2), (128, 2, 3, 0), (192, 8, 1, 1), (64, 3, 5, 4)])
def test_the_closed_form_of_other_sizes(size: tuple[int, int, int, int]) -> None:
    assert count(of_size(*size), VOCAB, LENGTH).total == by_hand(*size)


def test_the_preset_is_the_smallest_of_them() -> None:
    assert original() == of_size(256, 4, 4, 2)


@pytest.mark.parametrize(("dim", "experts"), [(256, 4), (384, 4), (64, 8)])
def test_the_operations_of_a_graph_layer(dim: int, experts: int) -> None:
    """Two linear maps of E vectors, the gate, and sums of E - 1 messages; a multiply-add is two operations.

    The original's gate is a linear map on each pair, 4D operations for each of E(E - 1); as two halves it is 4D for
    each of E.
    """
    flops = [count(of_size(dim, experts, 1, layers), VOCAB, LENGTH).forward_flops_per_token for layers in (0, 1, 2)]
    linear, gate, messages = 4 * experts * dim**2, 4 * dim * experts, 2 * dim * experts * (experts - 1)
    assert flops[1] - flops[0] == flops[2] - flops[1] == linear + gate + messages
    pairwise = linear + experts * (experts - 1) * (4 * dim + 2 * dim)
    assert pairwise - (flops[1] - flops[0]) == 4 * dim * experts * (experts - 2)


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_experts_cost_what_they_are_many(experts: int) -> None:
    """Nothing is sparse: without graph layers E blocks cost E times what one does, attention included."""
    dim, layers = 256, 4

    def of_blocks(number: int) -> float:
        size = count(of_size(dim, number, layers, 0), VOCAB, LENGTH)
        return size.forward_flops_per_token - 2 * (VOCAB * dim + layers * dim**2)  # head and combiners

    assert of_blocks(experts) == experts * of_blocks(1)
