"""Shards of any kind are written and read exactly, as torch reads and writes them; a rank reads its own alone."""

import io
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from moe_train.checkpoint import stored
from moe_train.checkpoint.state import read_tensors, write_tensors
from moe_train.dist.parts import Part
from moe_train.dist.world import World

W, EXPERTS = 4, 8
ORDERS = [[0, 1, 2, 3, 4, 5, 6, 7], [5, 0, 6, 7, 2, 4, 1, 3]]
"""Of experts over the places of all ranks."""
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "even rows": ((8, 3), [Shard(0), Shard(0)]),
    "uneven rows": ((6, 3), [Replicate(), Shard(0)]),
    "fewer rows than ranks": ((2, 3), [Shard(0), Shard(0)]),
    "columns": ((3, 8), [Replicate(), Shard(1)]),
    "uneven columns": ((3, 5), [Shard(1), Replicate()]),
    "both": ((5, 7), [Shard(0), Shard(1)]),
    "replicas": ((4, 4), [Replicate(), Replicate()]),
    "a vector": ((5,), [Replicate(), Shard(0)]),
}
BIG = torch.arange(EXPERTS * 64 * 256, dtype=torch.float32).view(EXPERTS, 64, 256)
"""An expert of it has 64 KiB: far more than what describes it."""
EXPERT_BYTES = BIG[0].nbytes
DESCRIPTION_BYTES = 6 * 1024
"""What may be read of a box beside its values, per box: the archive's directory and the pickle of shape and strides."""


def numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(tuple(shape))


def sharded(mesh: DeviceMesh, is_empty: bool) -> dict[str, Tensor]:
    return {
        name: distribute_tensor(torch.zeros(shape) if is_empty else numbered(shape), mesh, placements)
        for name, (shape, placements) in PLACEMENTS.items()
    }


def is_right(tensors: dict[str, Any]) -> bool:
    return all(torch.equal(tensor.full_tensor(), numbered(tensor.shape)) for tensor in tensors.values())


def metadata_of(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def shards_pass(world: World, folder: Path) -> dict[str, bool]:
    """Write and read with ours and with torch's own planner, in all four combinations."""
    mesh = init_device_mesh("cpu", (2, 2))
    told = {}
    ours = {name: Part.of(tensor) for name, tensor in sharded(mesh, is_empty=False).items()}
    write_tensors(folder / "ours", ours, world)
    torchs = sharded(mesh, is_empty=False)
    save(torchs, storage_writer=FileSystemWriter(folder / "torch"))
    for source in ("ours", "torch"):
        filled = sharded(mesh, is_empty=True)
        parts = {name: Part.of(tensor) for name, tensor in filled.items()}
        read_tensors(folder / source, metadata_of(folder / source), parts, world)
        told[f"{source} by ours"] = is_right(filled)
        filled = sharded(mesh, is_empty=True)
        load(filled, storage_reader=FileSystemReader(folder / source))
        told[f"{source} by torch"] = is_right(filled)
    return told


def expert_parts(rank: int, ep: int, order: Sequence[int], values: Tensor) -> tuple[Tensor, Part]:
    """This rank's experts in order of its places, and their part of the whole."""
    held = EXPERTS // ep
    experts = list(order[rank % ep * held :][:held])
    return values[experts].clone(), Part.of_experts(torch.zeros(held, *values.shape[1:]), experts, EXPERTS)


def experts_pass(world: World, folder: Path) -> dict[str, bool]:
    """Experts in any order at any EP size, shared by the ranks that hold the same: by places or by columns."""
    told = {}
    meshes = {ep: init_device_mesh("cpu", (W // ep, ep), mesh_dim_names=("edp", "ep")) for ep in (1, 2, 4)}
    whole = numbered((EXPERTS, 3, 4))
    layouts = list(itertools.product((1, 2, 4), ORDERS, (0, 2)))

    def part_of(ep: int, order: list[int], dim: int, values: Tensor) -> tuple[Any, Part]:
        experts = order[world.rank % ep * (EXPERTS // ep) :][: EXPERTS // ep]
        shared = distribute_tensor(values[experts].clone(), meshes[ep]["edp"], [Shard(dim)])
        return shared, Part.of_experts(shared, experts, EXPERTS)

    for number, (ep, order, dim) in enumerate(layouts):
        write_tensors(folder / f"experts{number}", {"w": part_of(ep, order, dim, whole)[1]}, world)
    for number, other in itertools.product(range(len(layouts)), range(len(layouts))):
        if (number + other) % 3:
            continue  # a third of the pairs has each layout on both sides, with itself and with others
        ep, order, dim = layouts[other]
        filled, part = part_of(ep, order, dim, torch.zeros_like(whole))
        read_tensors(folder / f"experts{number}", metadata_of(folder / f"experts{number}"), {"w": part}, world)
        experts = order[world.rank % ep * (EXPERTS // ep) :][: EXPERTS // ep]
        told[f"{layouts[number]} -> {(ep, order, dim)}"] = torch.equal(filled.full_tensor(), whole[experts])
    return told


class Counted(io.FileIO):
    """A file that notes which of its bytes are read."""

    def __init__(self, path: Path, seen: list[tuple[str, int, int]]) -> None:
        super().__init__(path, "rb")
        self.file_name, self.seen = path.name, seen

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        got = super().readinto(buffer) or 0
        self.seen.append((self.file_name, start, got))
        return got

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        got = super().read(size) or b""
        self.seen.append((self.file_name, start, len(got)))
        return got


@contextmanager
def counting(metadata: Metadata) -> Iterator[dict[str, int]]:
    """Count the bytes that are read of each tensor."""
    seen: list[tuple[str, int, int]] = []
    totals: dict[str, int] = defaultdict(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "opened", lambda path: Counted(path, seen))
        yield totals
    for name, start, length in seen:
        for index, place in metadata.storage_data.items():
            overlap = min(start + length, place.offset + place.length) - max(start, place.offset)
            if place.relative_path == name and overlap > 0:
                totals[index.fqn] += overlap


def bytes_read(world: World, folder: Path) -> dict[tuple[int, int, int], dict[str, int]]:
    """Read each EP size's files at each EP size, in each order, and count."""
    told = {}
    for ep in (1, 2, 4):
        values, part = expert_parts(world.rank, ep, ORDERS[0], BIG)
        for box in part.boxes:
            box.values.copy_(BIG[box.offsets[0] : box.offsets[0] + len(box.values)])
        others = {"other": Part.whole(torch.ones(1000)), "dense": Part.whole(BIG[0])}
        write_tensors(folder / f"big{ep}", {"w": part, **others}, world)
    for written, ep, order in itertools.product((1, 2, 4), (1, 2, 4), (0, 1)):
        source = folder / f"big{written}"
        metadata = metadata_of(source)
        values, part = expert_parts(world.rank, ep, ORDERS[order], BIG)
        dense = torch.zeros_like(BIG[0])
        with counting(metadata) as totals:
            read_tensors(source, metadata, {"w": part, "dense": Part.whole(dense)}, world)
        filled = torch.cat([box.values for box in part.boxes])
        assert torch.equal(filled, values) and torch.equal(dense, BIG[0])
        told[written, ep, order] = dict(totals)
    return told


def other_keys_on_each_rank(world: World, folder: Path) -> bool:
    """Experts that moved are read where they went, and nowhere else."""
    filled = torch.zeros_like(BIG[:1])
    parts = {"w": Part.of_experts(filled, [world.rank], EXPERTS)} if world.rank % 2 else {}
    read_tensors(folder / "big2", metadata_of(folder / "big2"), parts, world)
    return torch.equal(filled, BIG[world.rank : world.rank + 1] if parts else torch.zeros_like(filled))


def read_everything(world: World, folder: Path) -> dict[str, Any]:
    assert dist.get_world_size() == W
    return {
        "shards": shards_pass(world, folder),
        "experts": experts_pass(world, folder),
        "bytes": bytes_read(world, folder),
        "partial": other_keys_on_each_rank(world, folder),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(read_everything, W, tmp_path_factory.mktemp("files"))


def test_shards_are_exact_with_our_planner_and_with_torchs(told: list[dict[str, Any]]) -> None:
    for of_rank in told:
        assert set(of_rank["shards"]) == {f"{a} by {b}" for a in ("ours", "torch") for b in ("ours", "torch")}
        assert [name for name, right in of_rank["shards"].items() if not right] == []


def test_experts_are_exact_from_any_order_and_shard_to_any_other(told: list[dict[str, Any]]) -> None:
    for of_rank in told:
        assert len(of_rank["experts"]) == 12 * 12 // 3
        assert [name for name, right in of_rank["experts"].items() if not right] == []


def test_a_rank_reads_its_own_experts_and_no_others(told: list[dict[str, Any]]) -> None:
    for of_rank in told:
        for (written, ep, order), read in of_rank["bytes"].items():
            held = EXPERTS // ep
            assert set(read) == {"w", "dense"}, "nothing of a tensor that nobody asked for"
            described = DESCRIPTION_BYTES * min(held, written)
            case = f"{written} -> {ep} in order {order}"
            assert held * EXPERT_BYTES <= read["w"] <= held * EXPERT_BYTES + described, case
            assert EXPERT_BYTES <= read["dense"] <= EXPERT_BYTES + DESCRIPTION_BYTES, case


def test_each_rank_may_ask_for_other_keys(told: list[dict[str, Any]]) -> None:
    assert all(of_rank["partial"] for of_rank in told)
