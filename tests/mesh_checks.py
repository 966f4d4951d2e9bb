"""Runs checks on every size of group that a world has, and says which of them failed where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World

Check: TypeAlias = Callable[[Mesh], None]


def failures(world: World, checks: Sequence[Check]) -> dict[str, str]:
    """What went wrong by check and size of the group; half of four ranks, twice, for groups of two.

    A check that fails on one rank only would leave the others waiting: the spawn then shows its traceback.
    """
    wrong = {}
    for ep in (1, 2, 4):
        if world.size % ep == 0:
            mesh = build_mesh(world, ep)
            for check in checks:
                try:
                    check(mesh)
                except AssertionError as error:
                    wrong[f"{check.__name__} of {ep}"] = str(error) or "without words"
    return wrong


def said_of(check: Check, wrong: Sequence[dict[str, str]]) -> list[str]:
    """What went wrong with one check on any rank and size."""
    return [f"rank {rank}, {key}: {text}" for rank, own in enumerate(wrong) for key, text in own.items()
            if key.startswith(f"{check.__name__} ")]  # fmt: skip
