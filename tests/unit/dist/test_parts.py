"""Parts of tensors against plain indexing: each value of a rank stands at its place in the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.dist.parts import Box, Part, by_expert

SIZES = st.lists(st.integers(0, 4), min_size=0, max_size=3)


def numbered(shape: list[int]) -> Tensor:
    """A tensor whose values are all different."""
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def assembled(part: Part) -> Tensor:
    """The whole tensor, zero where this part has nothing; a value must not come from two boxes."""
    whole = torch.zeros(part.shape)
    for box in part.boxes:
        place = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.values.shape, strict=True))
        assert whole[place].shape == box.values.shape, "a box lies inside the whole"
        assert not whole[place].any(), "boxes are disjoint"
        whole[place] = box.values
    return whole


@settings(deadline=None)
@given(shape=SIZES)
def test_a_whole_tensor_is_one_box_or_none(shape: list[int]) -> None:
    values = numbered(shape)
    part = Part.whole(values)
    assert part.shape == tuple(shape)
    assert len(part.boxes) == int(values.numel() > 0)
    assert torch.equal(assembled(part), values)


@settings(deadline=None)
@given(data=st.data(), num_experts=st.integers(1, 9), below=st.lists(st.integers(1, 3), max_size=2))
def test_experts_in_any_order_of_places(data: st.DataObject, num_experts: int, below: list[int]) -> None:
    experts = data.draw(st.permutations(range(num_experts)))[: data.draw(st.integers(0, num_experts))]
    values = numbered([len(experts), *below])
    part = Part.of_experts(values, experts, num_experts)
    wanted = torch.zeros(num_experts, *below)
    wanted[experts] = values
    assert part.shape == tuple(wanted.shape)
    assert torch.equal(assembled(part), wanted)
    breaks = sum(b != a + 1 for a, b in itertools.pairwise(experts))
    assert len(part.boxes) == (breaks + 1 if experts else 0), "runs are not cut: a box each"


@settings(deadline=None)
@given(
    data=st.data(),
    experts=st.permutations(range(6)),
    first=st.integers(0, 5),
    columns=st.tuples(st.integers(0, 3), st.integers(1, 2)),
)
def test_a_box_of_experts_that_is_itself_a_shard(
    data: st.DataObject, experts: list[int], first: int, columns: tuple[int, int]
) -> None:
    """What ranks with the same experts share: some places, or some columns of all."""
    length = data.draw(st.integers(1, 6 - first))
    left, width = columns
    places = numbered([6, 5])
    box = Box(places[first : first + length, left : left + width], (first, left))
    wanted = torch.zeros(6, 5)
    for place in range(first, first + length):
        wanted[experts[place], left : left + width] = places[place, left : left + width]
    assert torch.equal(assembled(Part((6, 5), tuple(by_expert(box, experts)))), wanted)


def test_boxes_are_views_so_that_filling_them_fills_what_the_rank_holds() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    part = Part.of_experts(parameter, [5, 1, 2, 0], 6)
    assert [box.offsets for box in part.boxes] == [(5, 0), (1, 0), (0, 0)]
    for box in part.boxes:
        box.values.fill_(box.offsets[0])
    assert torch.equal(parameter, torch.tensor([5.0, 1.0, 1.0, 0.0]).unsqueeze(1).expand(4, 2))


def test_as_many_experts_as_values() -> None:
    with pytest.raises(AssertionError, match="3 experts are not those 2"):
        Part.of_experts(torch.zeros(3, 2), [0, 1], 4)
