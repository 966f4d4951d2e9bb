"""How experts share classes: the published matrix, the ends of each figure, and what a layer writes down."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_samples import DIM, context_of, make_layer, tokens

from moe_train.moe.balance import ClassRecord, RoutingRecord
from moe_train.moe.specialisation import (
    load_balance_variance,
    specialisation,
    specialisation_by_expert,
    utilisation,
)

PUBLISHED_CE = torch.tensor([[0, 166, 0], [166, 0, 0], [0, 0, 166], [0, 0, 0]]).t()
"""Counts of the notebook of NoorMajdoub/Mixture-of-experts_MoE: 4 experts, of which one is dead, and 3 classes."""
COUNTS = st.integers(1, 4).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=classes, max_size=classes
    ).map(torch.tensor)
)


def test_the_published_matrix() -> None:
    assert utilisation(PUBLISHED_CE).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert specialisation_by_expert(PUBLISHED_CE)[:3].tolist() == pytest.approx([1, 1, 1])
    assert specialisation_by_expert(PUBLISHED_CE)[3].isnan()
    assert specialisation(PUBLISHED_CE) == pytest.approx(1)
    assert load_balance_variance(utilisation(PUBLISHED_CE)) == pytest.approx(1 / 48)


def test_even_classes_are_no_specialisation_and_an_even_load_has_no_variance() -> None:
    even_CE = torch.full((3, 4), 5)
    assert specialisation(even_CE) == pytest.approx(0, abs=1e-12)
    assert load_balance_variance(utilisation(even_CE)) == 0


def test_a_mean_weighs_experts_by_what_comes_to_them() -> None:
    """One pure expert with 30 tokens, one with 5 of each of two classes."""
    assert specialisation(torch.tensor([[30, 5], [0, 5]])) == pytest.approx(30 / 40)


def test_by_hand() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert specialisation(torch.tensor([[3], [1], [0]])) == pytest.approx(1 - entropy / math.log(3))
    assert load_balance_variance(torch.tensor([0.7, 0.1, 0.1, 0.1])) == pytest.approx((0.45**2 + 3 * 0.15**2) / 4)


def test_what_is_undefined() -> None:
    assert specialisation(torch.tensor([[3, 4]])) is None, "one class"
    assert specialisation(torch.zeros(3, 4)) is None, "no token"
    assert utilisation(torch.zeros(3, 4)).tolist() == [0.0] * 4


@given(COUNTS)
def test_an_index_lies_between_0_and_1_and_no_order_matters(counts_CE: torch.Tensor) -> None:
    found = specialisation(counts_CE)
    if found is None:
        assert len(counts_CE) == 1 or not counts_CE.any()
        return
    assert -1e-12 <= found <= 1 + 1e-12
    assert specialisation(counts_CE.flip(0).flip(1)) == pytest.approx(found)


def test_a_layer_records_first_choices_by_class_and_mean_weights() -> None:
    layer = make_layer(top_k=2).eval()
    valid_BS = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    context = context_of(3, 3, valid_BS)
    told = type(context)(**{**vars(context), "classes_B": torch.tensor([1, 0, -100]), "num_classes": 2})
    x_BSD = tokens(3, 3)
    record, plain = layer(x_BSD, told).record, layer(x_BSD, context).record
    assert isinstance(record, ClassRecord) and type(plain) is RoutingRecord
    routing = layer.router(x_BSD.view(-1, DIM), context)
    counts, gates = [[0] * 4 for _ in range(2)], [0.0] * 4
    for t, valid in enumerate(valid_BS.flatten().tolist()):
        if valid and t // 3 < 2:  # the last text has no class
            counts[[1, 0][t // 3]][int(routing.experts_TK[t, 0])] += 1
        for k in range(2):
            gates[int(routing.experts_TK[t, k])] += routing.weights_TK[t, k].item() * valid
    figures = record.figures()
    assert figures["by_class"] == counts
    assert sum(map(sum, counts)) == 4
    assert record.gate_sum_E.tolist() == pytest.approx(gates)
    assert figures["utilisation"] == pytest.approx([sum(column) / 4 for column in zip(*counts, strict=True)])
    assert figures["load_balance_variance"] == pytest.approx(torch.tensor(gates).div(6).var(correction=0).item())
    assert {key: figures[key] for key in plain.figures()} == plain.figures()


def test_records_by_class_add_up() -> None:
    layer = make_layer().eval()
    context = context_of(2, 3)
    told = type(context)(**{**vars(context), "classes_B": torch.tensor([1, 0]), "num_classes": 2})
    record = layer(tokens(2, 3), told).record.detached()
    assert torch.equal((record + record).by_class_CE, 2 * record.by_class_CE)
    assert torch.equal((record + record).gate_sum_E, 2 * record.gate_sum_E)
