"""The sums of a step: packed, added up, and turned into the figures of a record."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case

from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.moe.balance import RoutingRecord
from moe_train.ops.loss import cross_entropy_sum
from moe_train.training.tally import Tally, add, layer_figures, pack, unpack


def record(counts: list[int], dropped: int = 0, dtype: torch.dtype = torch.float64) -> RoutingRecord:
    generator = torch.Generator().manual_seed(sum(counts))
    random_E = torch.rand(len(counts) + 3, dtype=torch.float64, generator=generator).to(dtype)
    return RoutingRecord(torch.tensor(counts), torch.tensor(dropped), random_E[3:], *random_E[:3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**52), min_size=1, max_size=9), st.integers(0, 2**52))
def test_pack_and_unpack_are_inverse_and_exact(counts: list[int], dropped: int) -> None:
    original = record(counts, dropped)
    copy = unpack(pack(original), len(counts))
    for field in dataclasses.fields(RoutingRecord):
        assert torch.equal(getattr(copy, field.name), getattr(original, field.name).double()), field.name


def test_records_add_up_field_by_field() -> None:
    a, b = record([1, 2]), record([3, 4])
    total = add(a, b)
    for field in dataclasses.fields(RoutingRecord):
        expected = getattr(a, field.name) + getattr(b, field.name)
        assert torch.equal(getattr(total, field.name), expected), field.name


def test_a_tally_keeps_no_graph() -> None:
    model, (tokens_BS, labels_BS) = Case("top-2").whole_model(), Case("top-2").batches()[0]
    output = model(tokens_BS)
    tally = Tally(model.moe_layers)
    tally.add(cross_entropy_sum(output.logits_BSV.flatten(0, 1), labels_BS.flatten()), output.records)
    assert tally.loss_sum is not None
    assert not tally.loss_sum.requires_grad
    assert not any(value.requires_grad for kept in tally.records for value in vars(kept).values())


def test_figures_of_a_layer() -> None:
    figures = layer_figures(record([6, 2, 0, 0], dropped=2), tokens=4)
    assert figures["load"] == [0.75, 0.25, 0.0, 0.0]
    assert figures["dropped_fraction"] == 0.25
    assert figures["max_violation"] == pytest.approx(2.0)
    assert figures["dead_experts"] == 2


def test_figures_of_a_layer_without_tokens_are_finite() -> None:
    figures = layer_figures(record([0, 0]), tokens=4)
    assert figures["load"] == [0.0, 0.0]
    assert figures["dropped_fraction"] == 0.0


def test_two_micro_batches_measure_as_one() -> None:
    case = Case("every third layer", ("model.layers=3", "model.ffn.every=3"), zero_router=True)
    model, (tokens_BS, labels_BS) = case.whole_model(), case.batches()[0]
    measured = []
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        mesh = build_mesh(world, 1)
        for parts in (1, 2):
            tally = Tally(model.moe_layers)
            for rows in torch.arange(len(tokens_BS)).chunk(parts):
                output = model(tokens_BS[rows])
                loss_sum = cross_entropy_sum(output.logits_BSV.flatten(0, 1), labels_BS[rows].flatten())
                tally.add(loss_sum, output.records)
            measured.append(tally.measure(tokens_BS.numel(), mesh))
    whole, halves = measured
    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        assert halves[name] == pytest.approx(value, rel=1e-12), name
    experts = case.config().model.ffn.num_experts
    assert whole["aux_loss"] == pytest.approx(1.0), "an untrained router with even scores"
    assert whole["z_loss"] == pytest.approx(math.log(experts) ** 2)
    assert whole["moe/layer_02/entropy"] == pytest.approx(math.log(experts))
    assert whole["moe/layer_02/load"] == [0.5, 0.5, 0.0, 0.0], "the depth of the layer, not its number among the MoE"
    assert "moe/layer_00/load" not in whole
