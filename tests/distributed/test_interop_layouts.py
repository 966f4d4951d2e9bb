"""Public folders are written and read by ranks that share the experts, at every EP size, with the same bytes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_up_model import E, expected, folder_of, held, public_tensors, whole
from safetensors.torch import load_file
from spawn import run_ranks

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.errors import CheckpointError, DataError
from moe_train.interop import save
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import Expected, check, fill
from moe_train.interop.parts import Part
from moe_train.interop.pieces import Held
from moe_train.interop.save import write
from moe_train.interop.target import appearing

SHARD_BYTES = [500, 1700, 10**9]


def truth() -> dict[str, torch.Tensor]:
    """The tensors, with a negative zero: a sum over ranks would lose its sign."""
    tensors = whole()
    tensors["packed"][0, 0, 0] = tensors["packed"][E - 1, 0, 0] = -0.0
    return tensors


def export(folder: Path, mesh: Mesh, world: World, shard_bytes: int, dtype: torch.dtype) -> Held:
    """Write what this rank holds; returns it."""
    own = held(truth(), mesh.layout.experts(mesh.rank, E))
    with appearing(folder, world) as partial:
        write(own, expected(), partial, mesh, world, dtype, shard_bytes)
        if world.is_leader:
            (partial / "config.json").write_text("{}")
    return own


def write_and_read_everywhere(world: World, folder: Path) -> dict[str, bool]:
    """Write at every EP size and read everything written at every EP size."""
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4)}
    results = {}
    for ep, mesh in meshes.items():
        for shard_bytes in SHARD_BYTES:
            own = export(folder / f"ep{ep}-{shard_bytes}", mesh, world, shard_bytes, torch.float32)
        export(folder / f"ep{ep}-bf16", mesh, world, 10**9, torch.bfloat16)
        check(own, expected(), PublicFolder.open(folder / f"ep{ep}-bf16"), world, torch.bfloat16)
    for name in sorted(path.name for path in folder.iterdir() if not path.name.endswith("bf16")):
        for ep, mesh in meshes.items():
            experts = mesh.layout.experts(mesh.rank, E)
            found = held({key: torch.full_like(tensor, torch.nan) for key, tensor in truth().items()}, experts)
            fill(found, expected(), PublicFolder.open(folder / name), world)
            wanted = held(truth(), experts).tensors
            results[f"{name} -> ep{ep}"] = all(torch.equal(found.tensors[key], wanted[key]) for key in wanted)
    return results


def fail_together(world: World, folder: Path) -> list[str]:
    """One rank's disk is full in its own files, then rank 0's in the pooled ones; then one rank cannot read a file."""
    mesh, told = build_mesh(world, 2), []
    plain = save._append
    for rank, size in ((1, 6 * 5 * 4), (0, E * 6 * 10 * 4)):

        def full(file, tensor, rank=rank, size=size):
            if world.rank == rank and tensor.nbytes == size:
                raise OSError(28, "No space left on device")
            plain(file, tensor)

        save._append = full
        try:
            export(folder / "full", mesh, world, 10**9, torch.float32)
        except CheckpointError as error:
            told.append(str(error))
        save._append = plain
    opened = PublicFolder.open(folder / "ep2-500")
    if world.rank == 1:
        del opened.shapes["norm.weight"]
    try:
        fill(held(truth(), mesh.layout.experts(mesh.rank, E)), expected(), opened, world)
    except DataError as error:
        told.append(str(error))
    return told


def scenario(world: World, folder: Path) -> tuple[dict[str, bool], list[str]]:
    (folder / "model").mkdir(exist_ok=True)
    results = write_and_read_everywhere(world, folder / "model")
    world.barrier()
    return results, fail_together(world, folder / "model")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[dict[str, bool], list[str]]]]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder / "model", run_ranks(scenario, 4, folder)


def test_trap_36_every_layout_reads_what_every_other_wrote(ran) -> None:
    _, results = ran
    assert len(results[0][0]) == 3 * len(SHARD_BYTES) * 3
    assert {case for exact, _ in results for case, is_equal in exact.items() if not is_equal} == set()


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("kind", [*map(str, SHARD_BYTES), "bf16"])
def test_every_layout_writes_the_same_bytes(ran, ep: int, kind: str) -> None:
    folder = ran[0] / f"ep{ep}-{kind}"
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wanted = public_tensors(truth())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        kept = kind != "bf16" or name.endswith("e_score_correction_bias")
        rounded = tensor if kept else tensor.bfloat16()
        assert found[name].dtype == rounded.dtype
        assert found[name].view(torch.uint8).equal(rounded.contiguous().view(torch.uint8)), name


def test_experts_are_written_by_those_who_hold_them(ran) -> None:
    index = json.loads((ran[0] / "ep4-1000000000" / "model.safetensors.index.json").read_text())["weight_map"]
    files = [{file for name, file in index.items() if name.startswith(f"experts.{e}.")} for e in range(E)]
    assert all(len(file) == 1 for file in files) and len(set.union(*files)) == E
    assert index["packed"] not in set.union(*files)


def test_all_ranks_raise_what_one_meets_and_nothing_stays(ran) -> None:
    folder, results = ran
    for _, told in results:
        own, pooled, unread = told
        assert "writing weights on rank 1: OSError" in own and "No space left" in own
        assert "writing weights on rank 0: OSError" in pooled
        assert "lacks norm.weight" in unread
    assert [path.name for path in folder.iterdir() if "partial" in path.name or path.name == "full"] == []


class Peak:
    """Largest anonymous memory of this process while the context lasts, above that at its beginning, in bytes.

    Anonymous memory is what the process allocates. The resident set also counts the pages of memory-mapped files, which
    belong to the system's cache, are shared by all ranks and are given back at any time: a reader of a large folder
    would seem to hold all of it.
    """

    def __enter__(self) -> Peak:
        self.start = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.growth = self.peak - self.start


def anonymous_bytes() -> int:
    """Memory of this process that is backed by no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no line of anonymous memory")


BIG_E, BIG_D, BIG_F, LAYERS = 8, 512, 1024, 9
MIB = 2**20


def big_expected() -> Expected:
    """A model of 300 MB, nearly all of it experts; one layer keeps its experts in one public tensor."""
    parts: dict[str, list[Part]] = {"embedding": [Part("embed.weight", (8192, BIG_D))]}
    for layer in range(LAYERS):
        shape = (BIG_D, 2 * BIG_F)
        parts[f"{layer}.experts"] = [
            Part(f"{layer}.all", (BIG_E, *shape), ours=(e,), theirs=(e,))
            if layer == 0
            else Part(f"{layer}.{e}", shape[::-1], ours=(e,), transposed=True)
            for e in range(BIG_E)
        ]
    return Expected(parts)


def big_held(mesh: Mesh, fill_value: float | None) -> Held:
    """This rank's tensors: drawn from the expert's number, or all one value."""
    experts = mesh.layout.experts(mesh.rank, BIG_E)
    tensors = {"embedding": torch.empty(8192, BIG_D)}
    tensors |= {f"{layer}.experts": torch.empty(len(experts), BIG_D, 2 * BIG_F) for layer in range(LAYERS)}
    for name, tensor in tensors.items():
        if fill_value is not None:
            tensor.fill_(fill_value)
            continue
        for piece, place in zip(
            tensor.view(-1, BIG_D, 2 * BIG_F), experts if "experts" in name else range(99), strict=False
        ):
            piece.normal_(generator=torch.Generator().manual_seed(hash((len(name), place))))
    return Held(tensors, frozenset(name for name in tensors if "experts" in name), experts)


def measured(world: World, folder: Path) -> dict[str, int]:
    """Export and import at EP=2; returns what memory that took beside the model, in bytes."""
    mesh = build_mesh(world, 2)
    held_ = big_held(mesh, None)
    with Peak() as exporting, appearing(folder / "to", world) as partial:
        write(held_, big_expected(), partial, mesh, world, torch.float32, 64 * MIB)
    if world.is_leader:
        (folder / "to" / "config.json").write_text("{}")
    world.barrier()
    again = big_held(mesh, torch.nan)
    with Peak() as importing:
        fill(again, big_expected(), PublicFolder.open(folder / "to"), world)
    assert all(torch.equal(again.tensors[name], held_.tensors[name]) for name in held_.tensors)
    own = sum(tensor.nbytes for tensor in held_.tensors.values())
    return {"own": own, "export": exporting.growth, "import": importing.growth}


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """Beside its own tensors a rank holds one public tensor when it writes: the largest has all experts of a layer."""
    results = run_ranks(measured, 2, tmp_path, timeout_s=240.0)
    whole_bytes = sum(path.stat().st_size for path in (tmp_path / "to").glob("*.safetensors"))
    largest, margin = BIG_E * BIG_D * 2 * BIG_F * 4, 24 * MIB
    assert whole_bytes > 300e6 and largest == 32 * MIB
    for result in results:
        assert result["own"] < 0.56 * whole_bytes
        assert result["export"] < largest + margin, result
        assert result["import"] < largest / 2, f"reads one expert at a time: {result}"
        assert result["own"] + result["export"] < 0.8 * whole_bytes


def test_the_measure_sees_what_is_allocated() -> None:
    with Peak() as peak:
        tensor = torch.ones(64 * MIB // 4)
        peak.done.wait(0.1)
    assert 60 * MIB < peak.growth < 100 * MIB and tensor.sum() > 0


def test_reading_in_one_process_needs_no_group_of_experts(tmp_path: Path) -> None:
    folder = PublicFolder.open(folder_of(tmp_path, public_tensors(truth())))
    assert not dist.is_initialized()
    assert torch.equal(folder.read("packed", 2), public_tensors(truth())["packed"][2])
