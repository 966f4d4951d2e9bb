"""Integers beside values: both come out as they went in."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.dist.riders import pack, riders_of, values_of


@settings(deadline=None, max_examples=30)
@given(
    num_rows=st.integers(0, 4),
    num_values=st.integers(1, 3),
    num_riders=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    is_transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@example(num_rows=2, num_values=1, num_riders=0, dtype=torch.float64, is_transposed=True, seed=0)  # strides of a column
def test_there_and_back(num_rows, num_values, num_riders, dtype, is_transposed, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_values, num_rows) if is_transposed else (num_rows, num_values)
    values = torch.randn(shape, dtype=dtype, generator=generator)
    values_NK = values.t() if is_transposed else values
    riders_NM = torch.randint(0, 2**31 - 1, (num_rows, num_riders), generator=generator)
    packed_NW = pack(values_NK, riders_NM)
    assert (packed_NW.dtype, packed_NW.shape[1]) == (torch.int32, num_riders + num_values * dtype.itemsize // 4)
    assert torch.equal(values_of(packed_NW, num_riders, dtype), values_NK)
    assert torch.equal(riders_of(packed_NW, num_riders), riders_NM)


def test_values_that_nobody_rides_along_with_stay_as_they_are() -> None:
    values_NK = torch.randn(3, 2)
    assert pack(values_NK, None) is values_NK


def test_values_of_half_a_word_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"riders cannot be beside torch\.bfloat16"):
        pack(torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64))
