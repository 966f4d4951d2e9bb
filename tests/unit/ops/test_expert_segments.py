"""Segments: sizes that recur, what fills them up, and the sizes' number."""

import torch
from ffn_samples import choices
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.expert_ffn.segments import LEAST_STEP, counts_of, exact_segments, filled_up, round_up
from moe_train.ops.permute import add_up, sum_rows_reference


@given(st.integers(0, 100_000))
def test_a_size_is_little_more_than_the_count(count: int) -> None:
    size = round_up(count)
    assert count <= size <= max(count + LEAST_STEP - 1, count + count // 16)
    assert size % LEAST_STEP == 0
    assert round_up(size) == size


def test_there_are_few_sizes() -> None:
    """Six products for each must stay far from the thousand kernels that oneDNN keeps."""
    assert len({round_up(count) for count in range(4097)}) <= 100
    assert round_up(0) == 0


@settings(max_examples=60, deadline=None)
@given(choices(), st.integers(1, 5))
def test_filled_segments_hold_the_same_rows(chosen: tuple[list[list[int]], int], step: int) -> None:
    rows, held = chosen
    experts_RK = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
    counts_L = counts_of(experts_RK, held)
    assert counts_L.tolist() == [int((experts_RK == e).sum()) for e in range(held)]
    exact = exact_segments(experts_RK, held, int(counts_L.sum()))
    sizes = [-(-n // step) * step for n in counts_L.tolist()]
    filled = filled_up(exact, counts_L, sizes, experts_RK.numel())
    assert filled.num_rows == sum(sizes)
    weights_RK = torch.arange(1.0, experts_RK.numel() + 1).view_as(experts_RK)
    found, start = filled.weights_of(weights_RK), 0
    for expert, size in enumerate(sizes):
        count = int(counts_L[expert])
        expected = weights_RK[experts_RK == expert]
        assert torch.equal(found[start : start + count], expected)
        assert not found[start + count : start + size].any()
        tokens = filled.rows.tokens_N[start : start + size]
        assert (tokens[count:] == tokens[:1]).all()
        start += size
    assert torch.equal(filled.by_choice(found, weights_RK), weights_RK * (experts_RK < held))
    values = torch.arange(float(exact.num_rows)).unsqueeze(1)
    moved = torch.full((filled.num_rows, 1), torch.nan)
    for expert, size in enumerate(sizes):  # the same values at their new places, undefined ones between them
        old, new, n = sum(counts_L.tolist()[:expert]), sum(sizes[:expert]), int(counts_L[expert])
        moved[new : new + n] = values[old : old + n]
        assert n <= size
    assert torch.equal(add_up(moved, filled.rows), sum_rows_reference(values, exact.rows))
