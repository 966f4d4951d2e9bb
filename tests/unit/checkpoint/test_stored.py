"""A box of a file is loaded once however many pieces are wanted of it, and a file that ends too early is no zeros."""

import gc
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import torch
from checkpoint_samples import Lone
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moe_train.checkpoint import stored
from moe_train.checkpoint.planner import PartReader
from moe_train.checkpoint.state import read_tensors, write_tensors
from moe_train.checkpoint.stored import BoxReader
from moe_train.dist.parts import Part

WHOLE = torch.arange(48.0).view(12, 4)


@dataclass(frozen=True)
class Lies:
    """A `stored.Place`."""

    relative_path: str
    offset: int
    length: int


@pytest.fixture
def folder(lone: Lone, tmp_path: Path) -> Path:
    write_tensors(tmp_path, {"w": Part.whole(WHOLE)}, lone.world)
    return tmp_path


def test_a_box_is_loaded_once(lone: Lone, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve experts in an order without runs are twelve pieces."""
    loads: list[int] = []
    loaded = stored.loaded
    monkeypatch.setattr(stored, "loaded", lambda file, place: (loads.append(place.offset), loaded(file, place))[1])
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    filled = torch.zeros(12, 4)
    part = Part.of_experts(filled, order, 12)
    assert len(part.boxes) == 12
    read_tensors(folder, FileSystemReader(folder).read_metadata(), {"w": part}, lone.world)
    assert torch.equal(filled, WHOLE[order]) and len(loads) == 1


def row_of(reader: BoxReader, key: str, row: int) -> Tensor:
    filled = torch.zeros(1, 4)
    planner = PartReader()
    planner.set_up_planner({key: Part.of_experts(filled, [row], 12)}, reader.metadata)
    reader.read(planner.create_local_plan().items, planner)
    return filled[0]


def test_reading_many_pieces_keeps_no_memory(lone: Lone, folder: Path) -> None:
    """Every read once left a trace in a cache of torch's: a kilobyte, behind which freed tensors were not used again.

    Each reader is a new one, so that each describes the box.
    """
    metadata = FileSystemReader(folder).read_metadata()

    def read(times: int) -> None:
        for number in range(times):
            assert torch.equal(row_of(BoxReader(folder, metadata), "w", number % 12), WHOLE[number % 12])
        gc.collect()

    tracemalloc.start()
    try:
        read(100)
        before_bytes, _ = tracemalloc.get_traced_memory()
        read(100)
        kept_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    finally:
        tracemalloc.stop()
    assert kept_bytes < 100 * 256


def test_no_box_is_described_twice(lone: Lone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path, {name: Part.whole(WHOLE + number) for number, name in enumerate("ab")}, lone.world)
    looks: list[int] = []
    described = stored.described

    def counted(file: IO[bytes], place: stored.Place) -> stored.Description:
        looks.append(place.offset)
        return described(file, place)

    monkeypatch.setattr(stored, "described", counted)
    reader = BoxReader(tmp_path, FileSystemReader(tmp_path).read_metadata())
    for row in (3, 0, 11, 3):
        for number, name in enumerate("ab"):
            assert torch.equal(row_of(reader, name, row), WHOLE[row] + number)
    assert len(looks) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_description_says_where_the_values_lie(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of part of a larger storage, behind other bytes of the file."""
    box = (torch.arange(120).view(10, 3, 4) % 7).to(dtype)[2:9]
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(100))
        torch.save(box, file)
    place = Lies("file", 100, path.stat().st_size - 100)
    with path.open("rb") as file:
        found = stored.described(file, place)
        assert (found.shape, found.dtype, found.is_contiguous) == ((7, 3, 4), dtype, True)
        assert found.row_bytes == 12 * dtype.itemsize
        assert torch.equal(stored.rows(file, found, 4, 2), box[4:6])


def test_what_lies_column_by_column_is_described_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    torch.save(WHOLE.t(), path)
    with path.open("rb") as file:
        found = stored.described(file, Lies("file", 0, path.stat().st_size))
    assert (found.shape, found.is_contiguous) == ((4, 12), False)


def test_a_file_that_gives_less_than_asked_is_asked_again() -> None:
    class Slow:
        position = 0

        def readinto(self, buffer: memoryview) -> int:
            buffer[0] = self.position
            self.position += 1
            return 1

    buffer = bytearray(5)
    stored.read_into(Slow(), memoryview(buffer))
    assert buffer == bytes(range(5))


def test_a_file_that_ends_within_a_tensor_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    with (tmp_path / "short").open("rb") as file, pytest.raises(EOFError, match="short ends within a tensor"):
        stored.read_into(file, memoryview(bytearray(5)))
