"""A box of a file is loaded once however many pieces are wanted of it, and a file that ends too early is no zeros."""

from pathlib import Path

import pytest
import torch
from checkpoint_samples import Lone
from torch.distributed.checkpoint.filesystem import FileSystemReader

from moe_train.checkpoint import stored
from moe_train.checkpoint.state import read_tensors, write_tensors
from moe_train.dist.parts import Part

WHOLE = torch.arange(48.0).view(12, 4)


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
