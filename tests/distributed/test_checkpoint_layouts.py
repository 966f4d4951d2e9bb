"""A checkpoint loads into any layout of ranks, exactly."""

from pathlib import Path

import torch
import torch.distributed as dist
from part_samples import parts_of
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import Checkpoint, open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World, joined

NUM_EXPERTS = 8
EXPERT_KEYS = frozenset({"model.experts.w", "optim.experts.w.exp_avg", "optim.experts.w.exp_avg_sq"})


def whole() -> dict[str, Tensor]:
    """The tensors without any layout."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed": (2048, 64), "model.router.bias": (NUM_EXPERTS,), "optim.embed.exp_avg": (2048, 64)}
    shapes |= dict.fromkeys(sorted(EXPERT_KEYS), (NUM_EXPERTS, 3, 5))
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return tensors | {"optim.experts.w.step": torch.tensor(50.0)}


def part(mesh: Mesh) -> dict[str, Tensor]:
    """This rank's tensors, cut by plain indexing."""
    held = mesh.layout.experts(mesh.rank, NUM_EXPERTS)
    return {key: tensor[held.start : held.stop] if key in EXPERT_KEYS else tensor for key, tensor in whole().items()}


def parts(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Part]:
    return parts_of(tensors, EXPERT_KEYS, mesh.layout.experts(mesh.rank, NUM_EXPERTS), NUM_EXPERTS)


def save(world: World, mesh: Mesh, folder: Path) -> Path:
    random = f"random of {world.rank}".encode()
    state = CheckpointState(parts(part(mesh), mesh), {"tokens": 7}, random)
    return CheckpointManager(folder, world, mesh.layout, keep=1).save(50, state)


def is_exact(found: Checkpoint, mesh: Mesh) -> bool:
    truth = part(mesh)
    filled = {key: torch.full_like(tensor, torch.nan) for key, tensor in truth.items()}
    found.fill(parts(filled, mesh))
    expected_random = f"random of {mesh.rank}".encode() if mesh.rank < found.manifest.world_size else None
    return (
        all(torch.equal(filled[key], truth[key]) for key in truth)
        and found.trainer == {"tokens": 7}
        and found.random == expected_random
    )


def save_and_load_all(world: World, run: Path) -> dict[str, bool]:
    """Save at every EP size of this world and load everything saved so far at every EP size."""
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4) if world.size % ep == 0}
    for ep, mesh in meshes.items():
        save(world, mesh, run / f"w{world.size}ep{ep}")
    saved = sorted(path.name for path in run.iterdir())
    return {
        f"{name} -> w{world.size}ep{ep}": is_exact(open_at(run / name, world), mesh)
        for name in saved
        for ep, mesh in meshes.items()
    }


def on_one_rank(run: Path) -> dict[str, bool]:
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        return save_and_load_all(world, run)


def test_every_layout_loads_every_other_exactly(tmp_path: Path) -> None:
    results = [on_one_rank(tmp_path)]
    results += run_ranks(save_and_load_all, 4, tmp_path)
    results += run_ranks(save_and_load_all, 2, tmp_path)
    results += [on_one_rank(tmp_path)]
    tried = {case for exact in results for case in exact}
    assert {"w4ep2 -> w4ep4", "w4ep2 -> w2ep2", "w4ep2 -> w2ep1", "w4ep2 -> w1ep1", "w1ep1 -> w4ep4"} <= tried
    assert {case for exact in results for case in exact if not exact[case]} == set()
    one_copy_bytes = sum(tensor.nbytes for tensor in whole().values())
    for folder in tmp_path.iterdir():
        written_bytes = sum(path.stat().st_size for path in folder.glob("step_00000050/*.distcp"))
        assert one_copy_bytes <= written_bytes < 1.1 * one_copy_bytes, "replicas are written once"
