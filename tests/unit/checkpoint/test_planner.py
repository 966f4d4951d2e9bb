"""What is written and read of parts against plain indexing, in one process, and the files against torch's own planner.

Boxes of several ranks are played by several parts of one process: what a part lacks must stay as it was.
"""

import itertools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_samples import Lone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moe_train.checkpoint.manifest import METADATA, TRAINER, Manifest, record_of
from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.reader import Checkpoint
from moe_train.checkpoint.state import read_tensors, write_tensors
from moe_train.dist.parts import Box, Part
from moe_train.errors import CheckpointError

OUTSIDE = -7.0


def cuts(size: int, positions: list[int]) -> list[tuple[int, int]]:
    """Cut a dimension into intervals, possibly empty ones."""
    edges = sorted({0, size, *(p % (size + 1) for p in positions)})
    return list(itertools.pairwise(edges)) or [(0, 0)]


def grid(whole: Tensor, rows: list[int], columns: list[int]) -> list[Box]:
    """All boxes of a grid over a matrix, that is of uneven sizes; those without values too."""
    return [
        Box(whole[top:bottom, left:right], (top, left))
        for top, bottom in cuts(whole.shape[0], rows)
        for left, right in cuts(whole.shape[1], columns)
    ]


def manifest_of(folder: Path) -> Manifest:
    (folder / TRAINER).write_text("{}")
    names = [path.name for path in folder.iterdir()]
    return Manifest(format=1, step=1, world_size=1, ep=1, files={name: record_of(folder / name) for name in names})


def checkpoint(folder: Path, lone: Lone) -> Checkpoint:
    return Checkpoint(folder, 1, {}, None, manifest_of(folder), lone.world)


POSITIONS = st.lists(st.integers(0, 20), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 5)),
    written=st.tuples(POSITIONS, POSITIONS),
    wanted=st.tuples(POSITIONS, POSITIONS),
    held=st.sets(st.integers(0, 15)),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float64, torch.bfloat16])] * 2),
    is_transposed=st.booleans(),
)
def test_any_boxes_are_read_from_any_boxes(
    lone: Lone,
    shape: tuple[int, int],
    written: tuple[list[int], list[int]],
    wanted: tuple[list[int], list[int]],
    held: set[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    is_transposed: bool,
) -> None:
    truth = torch.arange(1.0, 1.0 + shape[0] * shape[1]).view(shape).to(dtypes[0])
    source = truth.t().contiguous().t() if is_transposed else truth  # which torch saves with its strides
    filled = torch.full(shape, OUTSIDE, dtype=dtypes[1])
    boxes = [box for number, box in enumerate(grid(filled, *wanted)) if number in held and box.values.numel()]
    expected = torch.full(shape, OUTSIDE, dtype=dtypes[1])
    for box in boxes:
        rows, columns = (slice(o, o + n) for o, n in zip(box.offsets, box.values.shape, strict=True))
        expected[rows, columns] = truth[rows, columns].to(dtypes[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tensors(folder, {"model.w": Part(shape, tuple(grid(source, *written)))}, lone.world)
        metadata = read_metadata(folder, manifest_of(folder))
        read_tensors(folder, metadata, {"model.w": Part(shape, tuple(boxes))}, lone.world)
    assert torch.equal(filled, expected)


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    orders=st.tuples(st.permutations(range(6)), st.permutations(range(6))),
    cut=st.integers(0, 6),
)
def test_experts_move_between_any_two_orders(
    lone: Lone, data: st.DataObject, orders: tuple[list[int], list[int]], cut: int
) -> None:
    truth = torch.arange(24.0).view(6, 4)
    before, after = orders
    with tempfile.TemporaryDirectory() as place:
        parts = {"model.w": Part.of_experts(truth[before], before, 6)}
        write_tensors(Path(place), parts, lone.world)
        held = after[:cut]
        filled = torch.full((cut, 4), OUTSIDE)
        checkpoint(Path(place), lone).fill({"model.w": Part.of_experts(filled, held, 6)})
    assert torch.equal(filled, truth[held])


TENSORS = {
    "model.w": torch.arange(12.0).view(4, 3),
    "model.b": torch.arange(4, dtype=torch.bfloat16),
    "optim.w.step": torch.tensor(3.0),
}


def test_what_torch_has_written_is_read(lone: Lone, tmp_path: Path) -> None:
    save(TENSORS, storage_writer=FileSystemWriter(tmp_path), process_group=None)
    filled = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    checkpoint(tmp_path, lone).fill({key: Part.whole(tensor) for key, tensor in filled.items()})
    assert all(torch.equal(filled[key], TENSORS[key]) for key in TENSORS)


def test_what_is_written_torch_reads(lone: Lone, tmp_path: Path) -> None:
    parts = {key: Part.whole(tensor) for key, tensor in TENSORS.items()}
    parts["model.w"] = Part.of_experts(TENSORS["model.w"][[2, 3, 0, 1]], [2, 3, 0, 1], 4)
    write_tensors(tmp_path, parts, lone.world)
    filled = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    with warnings.catch_warnings(action="ignore"):
        load(filled, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(filled[key], TENSORS[key]) for key in TENSORS)


def test_a_tensor_without_values_is_in_no_file_and_is_not_missed(lone: Lone, tmp_path: Path) -> None:
    tensors = TENSORS | {"model.none": torch.zeros(0, 3)}
    parts = {key: Part.whole(tensor) for key, tensor in tensors.items()}
    write_tensors(tmp_path, parts, lone.world)
    checkpoint(tmp_path, lone).fill(parts)


# --- some keys only ---


@pytest.fixture
def saved(lone: Lone, tmp_path: Path) -> Checkpoint:
    write_tensors(tmp_path, {key: Part.whole(tensor) for key, tensor in TENSORS.items()}, lone.world)
    return checkpoint(tmp_path, lone)


def test_some_keys_alone_must_be_asked_for(saved: Checkpoint) -> None:
    bias = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"model\.w: is unexpected"):
        saved.fill({"model.b": Part.whole(bias)})
    assert not bias.any()
    saved.fill({"model.b": Part.whole(bias)}, partial=True)
    assert bias.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_some_boxes_alone_leave_the_others(saved: Checkpoint) -> None:
    filled = torch.full((4, 3), OUTSIDE)
    moved = Part((4, 3), (Box(filled[1:2], (1, 0)), Box(filled[3:4], (3, 0))))
    saved.fill({"model.w": moved}, partial=True)
    assert torch.equal(filled[[1, 3]], TENSORS["model.w"][[1, 3]])
    assert (filled[[0, 2]] == OUTSIDE).all()


def test_what_is_asked_for_must_be_there_all_the_same(saved: Checkpoint) -> None:
    wrong = {"model.none": Part.whole(torch.zeros(2)), "model.w": Part.whole(torch.zeros(5, 3))}
    with pytest.raises(CheckpointError) as caught:
        saved.fill(wrong, partial=True)
    assert [str(problem).split(";")[0] for problem in caught.value.problems] == [
        "model.none: is missing in the checkpoint",
        "model.w: has shape (4, 3) in the checkpoint, not (5, 3)",
    ]


def test_nothing_may_be_asked_for(saved: Checkpoint) -> None:
    saved.fill({}, partial=True)


def test_files_with_too_few_values_are_refused(lone: Lone, tmp_path: Path) -> None:
    """In a world of one torch lets them be written; read without a word they would leave old values in place."""
    half = Part((4, 3), (Box(TENSORS["model.w"][:2], (0, 0)),))
    write_tensors(tmp_path, {"model.w": half}, lone.world)
    assert (tmp_path / METADATA).exists()
    with pytest.raises(CheckpointError, match=r"the files hold 6 values too few of model\.w"):
        checkpoint(tmp_path, lone).fill({"model.w": Part.whole(torch.zeros(4, 3))})
