"""Measures for how long a training waits for a save: written in the foreground, and beside it.

Usage: [torchrun --standalone --nproc-per-node=N] python scripts/checkpoint_stall.py [--mib 200] [--repeats 7]

Each rank holds so many MiB of its own, as experts do; the two ways take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_train.checkpoint.background import BackgroundSaver, ForegroundSaver, Saved, Saver
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World, world_from_environment

TENSORS = 50


def state_of(world: World, mib: int) -> CheckpointState:
    """Return fp32 tensors of so many MiB on this rank's device, none of which another rank has."""
    held = 4
    width = mib * 2**20 // 4 // TENSORS // held
    places = range(world.rank * held, (world.rank + 1) * held)
    parts = {
        f"model.blocks.{n}.experts.w": Part.of_experts(
            torch.randn(held, width, device=world.device), places, held * world.size
        )
        for n in range(TENSORS)
    }
    return CheckpointState(parts, {"step": 0}, None)


def timed(saver: Saver, step: int, state: CheckpointState) -> tuple[float, float]:
    """Save, and return for how long the call blocked and when the checkpoint was there, in milliseconds."""
    start_s = time.perf_counter()
    saved = saver.save(step, state)
    stall_ms = (time.perf_counter() - start_s) * 1e3
    ended = saver.wait() or saved
    assert isinstance(ended, Saved)
    return stall_ms, ended.total_ms


def measure(world: World, folder: Path, mib: int, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Return first stall, median of the later ones, and median until published, of both ways."""
    layout = build_mesh(world, world.size).layout
    state = state_of(world, mib)
    savers: dict[str, Saver] = {
        "foreground": ForegroundSaver(CheckpointManager(folder / "a", world, layout, keep=1)),
        "background": BackgroundSaver(CheckpointManager(folder / "b", world, layout, keep=1)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in savers}
    for step in range(1, repeats + 2):
        for name, saver in savers.items():
            world.barrier()
            times[name].append(timed(saver, step, state))
    return {
        name: (
            found[0][0],
            statistics.median(stall for stall, _ in found[1:]),
            statistics.median(total for _, total in found[1:]),
        )
        for name, found in times.items()
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="For how long a training waits for a save.")
    parser.add_argument("--mib", type=int, default=200, help="state of each rank")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(words)
    with world_from_environment(600.0) as world:
        name = str(world.broadcast(tempfile.mkdtemp() if world.is_leader else None))
        found = measure(world, Path(name), arguments.mib, arguments.repeats)
        world.barrier()
    if not world.is_leader:
        return
    shutil.rmtree(name)
    print(f"{world.size} rank(s) of {world.device.type}, {arguments.mib} MiB each, {arguments.repeats} saves in turn")
    print("| saving | first stall, ms | stall, ms | published after, ms |\n|---|---|---|---|")
    for way, (first, stall, total) in found.items():
        print(f"| {way} | {first:.0f} | {stall:.0f} | {total:.0f} |")
    print(f"stall of the background over the foreground: {found['background'][1] / found['foreground'][1]:.3f}")


if __name__ == "__main__":
    main()
