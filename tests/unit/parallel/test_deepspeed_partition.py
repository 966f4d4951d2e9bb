"""A run of a tensor's values is a few boxes of it, wherever it begins and ends."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.moe.roles import Kind, Role
from moe_train.parallel.deepspeed.partition import boxes_of_run
from moe_train.parallel.deepspeed.state import Held, part_of_run


@st.composite
def runs(draw):
    """A shape and a run of its values, perhaps none of them."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    size = math.prod(shape)
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size))


@given(runs())
@settings(deadline=None, max_examples=300)
def test_the_boxes_of_a_run_hold_its_values_at_their_places_and_no_other(run):
    shape, start, stop = run
    whole = torch.arange(math.prod(shape))
    values = whole[start:stop]
    boxes = list(boxes_of_run(values, start, shape))
    filled = torch.full(shape, -1)
    for box in boxes:
        assert box.values.numel() > 0
        assert box.values.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), (
            "a copy would not be filled"
        )
        filled[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.values.shape, strict=True))] = box.values
    expected = torch.full((math.prod(shape),), -1)
    expected[start:stop] = values
    assert torch.equal(filled, expected.view(shape))
    assert sum(box.values.numel() for box in boxes) == stop - start, "boxes overlap"
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_run_across_experts_is_cut_at_each_and_moved_to_its_global_place():
    """Three experts of [2, 2] held at places 0, 1, 2 are the global experts 4, 5 and 6 of 8; the run begins in 4."""
    run = torch.arange(100)
    held = Held("w", (3, 2, 2), group=0, place=10, start=3, length=7)
    part = part_of_run(run, held, Role(Kind.EXPERT, 1.0, range(4, 7)), num_experts=8)
    assert part.shape == (8, 2, 2)
    whole = torch.full((8, 2, 2), -1)
    for box in part.boxes:
        whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.values.shape, strict=True))] = box.values
    assert whole.flatten()[4 * 4 + 3 : 4 * 4 + 10].tolist() == list(range(10, 17))
    assert (whole >= 0).sum() == 7


def test_a_rank_may_hold_nothing_of_a_parameter():
    part = part_of_run(torch.arange(9), Held("w", (2, 2), 0, place=-3, start=7, length=0), Role(Kind.DENSE, 1.0), 0)
    assert (part.shape, part.boxes) == ((2, 2), ())
