"""The sums of a step: packed, added up, and turned into the figures of a record."""

import math
import operator
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case
from torch import Tensor

from moe_train.dist.mesh import Mesh
from moe_train.models.transformer import Transformer
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.context import RoutingContext
from moe_train.ops.loss import cross_entropy_sum
from moe_train.training.mtp import mtp_labels, mtp_loss
from moe_train.training.tally import Tally, pack, total_statistics, unpack


def record(
    counts: list[int], *, tokens: int = 4, capacity: int = 0, device: int = 0, router: int = 0, rerouted: int = 0
) -> RoutingRecord:
    random = torch.rand(len(counts) + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(counts)))
    sums = [torch.tensor(number) for number in (tokens, counts, capacity, device, router, rerouted)]
    return RoutingRecord(*sums, entropy_sum=random[0], statistics=(random[1:2], random[2:]))


def run(
    model: Transformer, tokens_BS: Tensor, labels_BS: Tensor, first: int = 0
) -> tuple[Tensor, tuple[RoutingRecord, ...]]:
    """The loss and records of sequences that lie at ``first`` onward in their global batch."""
    output = model(tokens_BS, RoutingContext(tokens_BS, torch.arange(len(tokens_BS)) + first))
    return cross_entropy_sum(output.logits_BSV.flatten(0, 1), labels_BS.flatten()), output.records


def measured(case: Case, mesh: Mesh, parts: int = 1) -> dict[str, object]:
    """The figures of one batch in so many micro-batches."""
    model, (tokens_BS, labels_BS) = case.whole_model(), case.batches()[0]
    tally = Tally(model.expert_layers)
    for rows in torch.arange(len(tokens_BS)).chunk(parts):
        tally.add(*run(model, tokens_BS[rows], labels_BS[rows], int(rows[0])))
    return tally.measure(tokens_BS.numel(), mesh)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**52), min_size=1, max_size=9), st.integers(0, 2**52))
def test_pack_and_unpack_are_inverse_and_exact(counts: list[int], dropped: int) -> None:
    original = record(counts, capacity=dropped).tensors()
    copy = unpack(pack(original), original)
    for a, b in zip(copy, original, strict=True):
        assert torch.equal(a, b.double())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(2, 4))
def test_trap_12_records_add_up_and_stay_as_they_are(counts: list[int], parts: int) -> None:
    """A sum that changed what it adds would be seen by whoever reads it next."""
    records = [record([count + part for count in counts], rerouted=part) for part in range(parts)]
    before = [[tensor.clone() for tensor in one.tensors()] for one in records]
    total = reduce(operator.add, records)
    for place, tensor in enumerate(total.tensors()):
        assert torch.allclose(tensor, sum(tensors[place] for tensors in before), rtol=1e-15)
    assert all(
        torch.equal(a, b)
        for one, kept in zip(records, before, strict=True)
        for a, b in zip(one.tensors(), kept, strict=True)
    )


def test_a_tally_keeps_no_graph_and_changes_no_record() -> None:
    model, (tokens_BS, labels_BS) = Case("top-2").whole_model(), Case("top-2").batches()[0]
    tally = Tally(model.expert_layers)
    loss_sum, records = run(model, tokens_BS, labels_BS)
    before = [[tensor.clone() for tensor in one.tensors()] for one in records]
    tally.add(loss_sum, records)
    tally.add(loss_sum, records)
    assert tally.loss_sum is not None
    assert not tally.loss_sum.requires_grad
    assert not any(tensor.requires_grad for kept in tally.records for tensor in kept.tensors())
    assert all(
        torch.equal(a, b)
        for one, kept in zip(records, before, strict=True)
        for a, b in zip(one.tensors(), kept, strict=True)
    )
    assert any(tensor.requires_grad for one in records for tensor in one.tensors()), "backward comes after"


def test_figures_of_a_layer() -> None:
    figures = record([6, 2, 0, 0], capacity=2, rerouted=1).figures()
    assert figures["load"] == [0.75, 0.25, 0.0, 0.0]
    assert figures["dropped_fraction"] == 0.25
    assert figures["rerouted_fraction"] == 0.125
    assert figures["max_violation"] == pytest.approx(2.0)
    assert figures["dead_experts"] == 2
    assert "bias_range" not in figures


def test_the_entropy_is_a_mean_over_the_tokens_of_its_own_layer() -> None:
    """A layer of multi-token prediction sees fewer than the others, and one of padding alone sees none."""
    summed = record([6, 2]).entropy_sum.item()
    assert record([6, 2], tokens=4).figures()["entropy"] == pytest.approx(summed / 4)
    assert record([6, 2], tokens=1).figures()["entropy"] == pytest.approx(summed)


def test_drops_are_told_apart_by_cause_and_add_up() -> None:
    figures = record([8, 8], capacity=1, device=2, router=5).figures()
    causes = {name: figures[f"dropped_{name}_fraction"] for name in ("capacity", "device", "router")}
    assert causes == {"capacity": 1 / 16, "device": 2 / 16, "router": 5 / 16}
    assert figures["dropped_fraction"] == sum(causes.values())


def test_trap_13_figures_of_a_layer_without_tokens_are_finite() -> None:
    """A step of padding alone."""
    figures = record([0, 0], tokens=0).figures()
    assert figures.pop("load") == [0.0, 0.0]
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["dropped_fraction"] == 0.0


@pytest.mark.parametrize("extras", [(), ("balance.aux.scope=sequence",), ("balance.importance_load.load_coef=0.0",)])
def test_trap_15_two_micro_batches_measure_as_one(lone_mesh: Mesh, extras: tuple[str, ...]) -> None:
    """What is logged does not depend on accumulation."""
    case = Case("every third layer", ("model.layers=3", "model.ffn.every=3", *extras), zero_router=True)
    whole, halves = measured(case, lone_mesh), measured(case, lone_mesh, parts=2)
    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        assert halves[name] == pytest.approx(value, rel=1e-12), name
    experts = case.config().model.ffn.num_experts
    assert whole["aux_loss"] == pytest.approx(1.0), "an untrained router with even scores"
    assert whole["z_loss"] == pytest.approx(math.log(experts) ** 2)
    assert whole["moe/layer_02/entropy"] == pytest.approx(math.log(experts))
    assert whole["moe/layer_02/load"] == [0.5, 0.5, 0.0, 0.0], "the depth of the layer, not its number among the MoE"
    assert "moe/layer_00/load" not in whole


def test_trap_14_the_reported_loss_is_the_cross_entropy_alone(lone_mesh: Mesh) -> None:
    """However large the balance losses and their weights are."""
    heavy = Case("heavy losses", ("balance.aux.coef=100.0", "balance.z_loss.coef=100.0"))
    light = Case("no losses", ("balance.aux.coef=0.0", "balance.z_loss.coef=0.0"))
    model, (tokens_BS, labels_BS) = heavy.whole_model(), heavy.batches()[0]
    expected = run(model, tokens_BS, labels_BS)[0].item() / tokens_BS.numel()
    figures = [measured(case, lone_mesh) for case in (heavy, light)]
    assert figures[0]["loss"] == figures[1]["loss"] == pytest.approx(expected, rel=1e-14)
    assert figures[0]["aux_loss"] == figures[1]["aux_loss"] > 0.5, "reported beside it, unweighted"


def test_the_loss_of_multi_token_prediction_is_a_mean_over_what_its_modules_predict(lone_mesh: Mesh) -> None:
    """Beside the loss, unweighted, and the same for one pass and for two."""
    case = Case("further ahead", ("model.mtp.depth=2",))
    model, (tokens_BS, labels_BS) = case.whole_model(), case.batches()[0]
    figures = []
    for parts in (1, 2):
        tally = Tally(model.expert_layers)
        for rows in torch.arange(len(tokens_BS)).chunk(parts):
            later = mtp_labels(labels_BS[rows], 2, boundary_id=None)
            losses = model(tokens_BS[rows], RoutingContext(tokens_BS[rows], rows), [labels_BS[rows], *later])
            tally.add(losses.loss_sums[0], losses.records, mtp_loss(losses, later))
        figures.append(tally.measure(tokens_BS.numel(), lone_mesh))
    output = model(tokens_BS)
    sums = [
        cross_entropy_sum(logits_BSV[:, : -k - 1].flatten(0, 1), labels_BS[:, k + 1 :].flatten()).item()
        for k, logits_BSV in enumerate(output.mtp_logits)
    ]
    sequences, length = tokens_BS.shape
    assert figures[0]["mtp_loss"] == pytest.approx(sum(sums) / (sequences * (length - 1 + length - 2)), rel=1e-12)
    assert figures[0].keys() == figures[1].keys()
    assert figures[1]["mtp_loss"] == pytest.approx(figures[0]["mtp_loss"], rel=1e-12)
    assert figures[0]["loss"] == pytest.approx(
        cross_entropy_sum(output.logits_BSV.flatten(0, 1), labels_BS.flatten()).item() / tokens_BS.numel(), rel=1e-12
    )
    assert {f"moe/layer_{depth:02d}/load" for depth in range(4)} <= figures[0].keys(), "modules follow the blocks"


def test_every_configured_loss_is_reported_by_its_name(lone_mesh: Mesh) -> None:
    losses = ("balance.importance_load.load_coef=0.0", "balance.device.devices=2", "balance.communication.devices=2")
    figures = measured(Case("all losses", losses), lone_mesh)
    assert {name for name in figures if name.endswith("_loss")} == {
        "aux_loss", "z_loss", "importance_loss", "load_loss", "device_loss", "communication_loss",
    }  # fmt: skip
    plain = measured(Case("top-2"), lone_mesh)
    assert {name for name in plain if name.endswith("_loss")} == {"aux_loss", "z_loss"}


def test_trap_37_a_model_without_experts_is_measured_too(lone_mesh: Mesh) -> None:
    """Nothing waits for layers that are not there."""
    assert measured(Case("dense", ("model=dense_tiny", "model.ffn.num_experts=0")), lone_mesh).keys() == {"loss"}
    assert total_statistics([], lone_mesh) == []


def test_statistics_are_told_apart_by_layer_and_loss(lone_mesh: Mesh) -> None:
    model, (tokens_BS, labels_BS) = Case("top-2").whole_model(), Case("top-2").batches()[0]
    _, records = run(model, tokens_BS, labels_BS)
    totals = total_statistics(records, lone_mesh)
    assert len(totals) == len(records) == 2
    for total, one in zip(totals, records, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(total, one.statistics, strict=True))
