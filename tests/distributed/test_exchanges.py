"""The layout contract holds for every exchange, in however many parts: fp64, 1e-10, against the oracle."""

from __future__ import annotations

import layouts
import oracle
import pytest
import torch
from layout_cases import CASES
from layouts import RATES, differences, run_layout
from spawn import run_ranks

from moe_train.config.schema import LayoutConfig
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.moe.exchange import Exchange, exchange_for

pytestmark = pytest.mark.timeout(900)
NODE = 2
WANTED = (
    "ranks with zero valid tokens",
    "capacity per sequence",
    "MoE every other layer, shared expert, untied head",
)
FEW = [case for case in CASES if case.name in WANTED]
LAYOUTS = [
    (kind, ep, parts)
    for kind in ("alltoall", "allgather", "hierarchical")
    for ep in (1, 2, 4)
    for parts in (1, 2, 3)
    if ep > 1 or (kind, parts) == ("allgather", 3)  # where no token travels
    if kind != "hierarchical" or ep > NODE
]


def exchange_by(kind: str, parts: int):
    """Stands for `exchange_for` in the runner of layouts."""

    def chosen(mesh: Mesh, num_experts: int, padded: bool) -> Exchange:
        config = LayoutConfig(ep=mesh.layout.ep, exchange=kind, node_size=NODE, overlap=parts, timeout_s=30.0)
        return exchange_for(mesh, num_experts, padded, config, top_k=2)

    return chosen


def wrong_on(world: World) -> dict[tuple[str, str, int, int], list[str]]:
    torch.set_num_threads(1)
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4)}
    wrong = {}
    for case in FEW:
        truth = oracle.train(case.config(), case.whole_model(), case.batches(), RATES, case.split(4, 2))
        for kind, ep, parts in LAYOUTS:
            layouts.exchange_for = exchange_by(kind, parts)
            found = run_layout(meshes[ep], case, accumulation=2)
            wrong[case.name, kind, ep, parts] = differences(found, truth, 1e-10)
    return wrong


@pytest.fixture(scope="module")
def wrong() -> list[dict[tuple[str, str, int, int], list[str]]]:
    return run_ranks(wrong_on, 4, timeout_s=800)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alltoall", "allgather", "hierarchical"])
def test_every_exchange_equals_the_oracle(wrong, kind) -> None:
    said = [{key: lines for key, lines in own.items() if key[1] == kind} for own in wrong]
    assert all(len(own) >= 3 * len(FEW) for own in said)
    assert [{key: lines for key, lines in own.items() if lines} for own in said] == [{}] * 4


def test_there_are_cases_with_drops_silent_ranks_and_shared_experts() -> None:
    assert {case.name for case in FEW} == set(WANTED)
