"""What must hold of the tensor functions for every input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.ops.grouped_gemm import LoopProducts, grouped_gemm_reference
from moe_train.ops.permute import RowMap, gather_rows, map_rows, sum_rows, sum_rows_reference
from moe_train.ops.topk import top_k, top_k_reference

QUICK = settings(max_examples=80, deadline=None)
WIDTH = 3


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A table [T, M] of destinations, some of them none, and the number of destinations."""
    tokens, choices, destinations = (draw(st.integers(low, high)) for low, high in ((0, 8), (1, 4), (1, 5)))
    entry = st.integers(0, destinations)
    cells = draw(st.lists(entry, min_size=tokens * choices, max_size=tokens * choices))
    return torch.tensor(cells, dtype=torch.int64).view(tokens, choices), destinations


def rows_of(destinations_TM: Tensor, num_destinations: int) -> RowMap:
    return map_rows(destinations_TM, num_destinations, int((destinations_TM < num_destinations).sum()))


def random_rows(number: int, seed: int) -> Tensor:
    return torch.randn(number, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(tables())
def test_the_map_lists_every_choice_by_destination(table: tuple[Tensor, int]) -> None:
    destinations_TM, number = table
    flat = destinations_TM.flatten().tolist()
    expected = sorted((i for i, place in enumerate(flat) if place < number), key=lambda i: flat[i])
    row_map = rows_of(destinations_TM, number)
    assert row_map.choices_N.tolist() == expected
    assert row_map.tokens_N.tolist() == [i // destinations_TM.shape[1] for i in expected]


@QUICK
@given(tables())
def test_gather_and_sum_are_adjoint(table: tuple[Tensor, int]) -> None:
    """<gather(x), y> = <x, sum(y)> for all x and y."""
    row_map = rows_of(*table)
    x_TD, y_ND = random_rows(table[0].shape[0], 0), random_rows(len(row_map.tokens_N), 1)
    there = (gather_rows(x_TD, row_map) * y_ND).sum()
    back = (x_TD * sum_rows(y_ND, row_map)).sum()
    assert torch.allclose(there, back, rtol=0, atol=1e-12)


@QUICK
@given(tables())
def test_round_trip_multiplies_by_the_number_of_rows(table: tuple[Tensor, int]) -> None:
    row_map = rows_of(*table)
    x_TD = random_rows(table[0].shape[0], 0)
    copies_T1 = (table[0] < table[1]).sum(dim=1, keepdim=True)
    assert torch.allclose(sum_rows(gather_rows(x_TD, row_map), row_map), x_TD * copies_T1, rtol=0, atol=1e-13)


@QUICK
@given(tables())
def test_sum_equals_the_reference(table: tuple[Tensor, int]) -> None:
    row_map = rows_of(*table)
    y_ND = random_rows(len(row_map.tokens_N), 0)
    assert torch.allclose(sum_rows(y_ND, row_map), sum_rows_reference(y_ND, row_map), rtol=0, atol=1e-13)


@QUICK
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 8))
def test_products_in_blocks_equal_the_reference(counts: list[int], block_rows: int) -> None:
    x_ND, w_LDF = random_rows(sum(counts), 0), random_rows(len(counts) * 2, 1).view(len(counts), WIDTH, 2)
    products = LoopProducts(counts, block_rows)
    parts = [products.times(x_ND[block.rows], w_LDF, block) for block in products.blocks()]
    expected_NF = grouped_gemm_reference(x_ND, w_LDF, torch.tensor(counts))
    assert torch.allclose(torch.cat(parts), expected_NF, rtol=0, atol=1e-13)


@QUICK
@given(st.data(), st.integers(1, 6), st.integers(0, 5))
def test_top_k_equals_a_stable_sort(data: st.DataObject, num_experts: int, tokens: int) -> None:
    """Few distinct scores, so that most rows have ties."""
    cells = data.draw(st.lists(st.integers(-1, 1), min_size=tokens * num_experts, max_size=tokens * num_experts))
    scores_TE = torch.tensor(cells, dtype=torch.float32).view(tokens, num_experts)
    k = data.draw(st.integers(1, num_experts))
    assert torch.equal(top_k(scores_TE, k), top_k_reference(scores_TE, k))
