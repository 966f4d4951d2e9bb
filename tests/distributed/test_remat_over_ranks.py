"""Recomputation on layouts of several ranks: the same bits, and no token and no question travels twice by mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from layout_cases import ARCHITECTURES, GRAPH, MIXED, NO_LOSS, PLAIN
from layouts import Case
from remat_runs import MODES, Ran, differences, remat, run
from spawn import run_ranks

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World

pytestmark = pytest.mark.timeout(300)
CASES = [
    PLAIN[0],
    PLAIN[5],
    NO_LOSS[8],
    NO_LOSS[10],
    MIXED[0],
    MIXED[15],
    *ARCHITECTURES[:2],
    GRAPH[0],
    GRAPH[1],
    GRAPH[3],
]
"""Plain; ranks without tokens; sinkhorn and base, which ask all ranks; rerouting over them; padded buffers; DeepSeek
with shared experts, latent attention, biases and modules ahead; coupled networks and blocks, also with a recomputation
of their own."""
QUICK = [PLAIN[5], MIXED[0], ARCHITECTURES[0], GRAPH[1]]
LAYOUTS = {2: [(1, 1, 2), (2, 1, 2), (1, 2, 2)], 4: [(2, 1, 1), (4, 1, 2), (2, 2, 1), (1, 4, 1)]}
"""(ep, dp_shard, accumulation) by world size."""
ASKED = ("all_reduce", "all_gather", "all_to_all_single")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of torch's collectives of this process."""
    calls: Counter[str] = Counter()

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return collective(*args, **kwargs)

        return call

    patches = [mock.patch.object(dist, name, counting(name, getattr(dist, name))) for name in ASKED]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def wrong_with(case: Case, mesh: Mesh, accumulation: int) -> list[str]:
    """What recomputation changes in a step on a layout."""
    ran: dict[str, tuple[Ran, Counter[str]]] = {}
    for mode in ("none", *MODES):
        with counted() as calls:
            ran[mode] = run(case, mesh, remat(mode), accumulation), calls
    expected, asked = ran["none"]
    wrong = [f"{mode}: {name}" for mode in MODES for name in differences(ran[mode][0], expected)]
    if ran["selective"][0].rows_sent != expected.rows_sent or ran["selective"][1] != asked:
        wrong.append(f"selective: {ran['selective'][1]} collectives, not {asked}")
    # What a block sends forwards goes twice, and nothing else does: no counts, no questions of routers.
    again = ran["full"][0].rows_sent - expected.rows_sent
    travels = (mesh.layout.ep > 1 and not recomputes_itself(case)) or is_padded(case)
    if (again > 0) != travels:
        wrong.append(f"full: {again} journeys more")
    more = ran["full"][1] - asked
    if sum(more.values()) > again:
        wrong.append(f"full: {more} collectives more, for {again} journeys")
    return wrong


def is_padded(case: Case) -> bool:
    """Buffers of fixed size travel even where there is one rank."""
    return "capacity.pad=true" in case.overrides


def recomputes_itself(case: Case) -> bool:
    """Its tokens travel again in any case, and once is enough."""
    return any(key.endswith("graph.recompute=true") for key in case.overrides)


def wrong_on(
    world: World, cases: list[Case], layouts: list[tuple[int, int, int]]
) -> dict[tuple[str, int, int], list[str]]:
    """What is wrong on the layouts of a number of ranks."""
    found = {}
    for ep, dp_shard, accumulation in layouts:
        mesh = build_mesh(world, ep, dp_shard)
        found |= {(case.name, ep, dp_shard): wrong_with(case, mesh, accumulation) for case in cases}
    return {key: wrong for key, wrong in found.items() if wrong}


def test_the_same_bits_and_no_collective_more_on_two_ranks() -> None:
    assert run_ranks(wrong_on, 2, QUICK, LAYOUTS[2][1:2]) == [{}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size", LAYOUTS)
def test_the_same_on_every_layout(size: int) -> None:
    """Sharded weights included: what is computed again finds them whole."""
    assert run_ranks(wrong_on, size, CASES, LAYOUTS[size], timeout_s=280.0) == [{}] * size
