"""Held-out text that does not fill the ranks: layers in which all ranks exchange everything neither hang nor differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layout_cases import ON_ALL_LAYOUTS, PLAIN
from layouts import LENGTH, VOCAB, Case
from spawn import run_ranks

from moe_train.data.loader import heldout_batches
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import exchange_for
from moe_train.training.evaluate import evaluate

BATCH = 2
CASES = [case for case in ON_ALL_LAYOUTS if case not in PLAIN]
WINDOWS = (1, 3, 11)
"""Of four ranks with two rows each: three get nothing but padding, two do, or one in the second pass."""


class Store:
    """Some text whose last window is not full."""

    def __init__(self, num_windows: int) -> None:
        self.num_tokens = num_windows * LENGTH
        self.num_bytes = 2 * self.num_tokens
        self.tokens_N = np.random.default_rng(num_windows).integers(0, VOCAB, self.num_tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        return self.tokens_N[start : start + length]

    def unigram_entropy_bits_per_byte(self) -> float:
        return 1.0


def evaluated(world: World, mesh: Mesh, case: Case, num_windows: int) -> dict[str, float]:
    config = case.config().model
    exchange = exchange_for(mesh, config.ffn.num_experts, padded=False)
    model = case.prepare(build_model(config, VOCAB, exchange, "fp64", torch.device("cpu")))
    return evaluate(model, Store(num_windows), world, mesh, LENGTH, BATCH, None)


def on_every_mesh(world: World) -> dict[tuple[str, int, int], dict[str, float]]:
    torch.set_num_threads(1)
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4) if ep <= world.size}
    return {
        (case.name, num_windows, ep): evaluated(world, mesh, case, num_windows)
        for case in CASES
        for num_windows in WINDOWS
        for ep, mesh in meshes.items()
    }


@pytest.mark.parametrize("num_windows", WINDOWS)
def test_every_rank_gets_as_many_batches_of_the_same_shape(num_windows: int) -> None:
    shapes = [
        [batch.tokens_BS.shape for batch in heldout_batches(Store(num_windows), LENGTH, BATCH, rank, 4, None)]
        for rank in range(4)
    ]
    assert shapes == [[(BATCH, LENGTH)] * -(-num_windows // (4 * BATCH))] * 4


@pytest.mark.slow
def test_evaluation_is_the_same_on_every_layout() -> None:
    with joined(dist.HashStore(), World(0, 1, torch.device("cpu"), 30.0)):
        truth = on_every_mesh(World(0, 1, torch.device("cpu"), 30.0))
    found = run_ranks(on_every_mesh, 4)
    assert all(own == found[0] for own in found)
    assert len(found[0]) == 3 * len(truth) == 3 * len(CASES) * len(WINDOWS)
    for (case, num_windows, ep), figures in found[0].items():
        assert figures == pytest.approx(truth[case, num_windows, 1], rel=1e-12), (case, num_windows, ep)
        assert figures["eval_tokens"] == num_windows * LENGTH - 1
