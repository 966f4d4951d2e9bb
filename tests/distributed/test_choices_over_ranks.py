"""Choices over several ranks: causal and foresighted losses are the same on every layout, and groups of experts that
are ranks bound the ranks that a token visits, and the bytes that travel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import BATCH, LENGTH, RATES, VOCAB, Case, rank_batches, torch_engine
from spawn import run_ranks

from moe_train.benchmark.rank_visits import Travelled, travelled, watch_ranks
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.parallel.engine import Engine
from moe_train.training.evaluate import evaluate
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

OFF = ("model.ffn.balance.aux=null", "model.ffn.balance.z_loss=null")
TAKING = Case("experts take tokens", ("router.kind=expert_choice", "router.allow_future_leak=true", *OFF))
TRAVELS = ("train.precision=fp32", f"train.global_batch={BATCH}", f"data.seq_len={LENGTH}", "model.ffn.num_experts=8")
LEVELS = ("router.kind=hierarchical", *TRAVELS)
VISITS = {
    1: Case("groups are ranks, one of them", (*LEVELS, "router.groups=4", "router.top_groups=1")),
    2: Case("groups are ranks, two of them",
            (*LEVELS, "router.groups=4", "router.top_groups=2", "model.ffn.top_k=4")),
    -2: Case("groups are two ranks each, one of them", (*LEVELS, "router.groups=2", "router.top_groups=1")),
    4: Case("free choice of four", (*TRAVELS, "model.ffn.top_k=4")),
}  # fmt: skip
"""By the ranks of four that a token visits at most; negative to have another key."""


class Store:
    """Some text whose last window is not full."""

    num_tokens, num_bytes = 3 * LENGTH, 5 * LENGTH
    tokens_N = np.random.default_rng(0).integers(0, VOCAB, num_tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        return self.tokens_N[start : start + length]

    def unigram_entropy_bits_per_byte(self) -> float:
        return 1.0


def train(engine: Engine, mesh: Mesh, case: Case) -> None:
    """Three steps."""
    for step, (batch, rate) in enumerate(zip(case.batches(), RATES, strict=True)):
        settings = replace(settings_at(step, case.config(), None), learning_rate=rate)
        train_step(engine, mesh, rank_batches(batch, mesh.rank, mesh.layout.world_size, 1), BATCH * LENGTH, settings)


def evaluated(world: World) -> dict[int, dict[str, float]]:
    """What an evaluation says after some steps, by EP size."""
    found = {}
    for ep in (1, 2, 4)[: world.size]:
        mesh = build_mesh(world, ep)
        engine = torch_engine(mesh, TAKING, "fp64")
        train(engine, mesh, TAKING)
        assert any(key.endswith("router.threshold_E") for key in engine.parts()), "a checkpoint holds thresholds"
        found[ep] = evaluate(engine.model, Store(), world, mesh, LENGTH, 2, None)
        assert engine.model.training
    return found


def visited(world: World) -> dict[int, Travelled]:
    """What three steps move on one EP group of all ranks."""
    found, mesh = {}, build_mesh(world, world.size)
    for most, case in VISITS.items():
        engine = torch_engine(mesh, case, "fp32")
        watched = watch_ranks(engine.model, case.config(), world)
        work = lambda engine=engine, case=case: train(engine, mesh, case)  # noqa: E731
        found[most] = travelled(work, len(RATES), watched, case.config(), world)
    return found


def both(world: World) -> tuple[dict[int, dict[str, float]], dict[int, Travelled]]:
    torch.set_num_threads(1)
    return evaluated(world), visited(world)


@pytest.fixture(scope="module")
def results() -> list[tuple[dict[int, dict[str, float]], dict[int, Travelled]]]:
    return run_ranks(both, 4)


@pytest.fixture(scope="module")
def alone() -> dict[str, float]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        return evaluated(world)[1]


def test_both_losses_are_the_same_on_every_layout(results, alone: dict[str, float]) -> None:
    for on_rank, _ in results:
        assert on_rank.keys() == {1, 2, 4}
        for ep, figures in on_rank.items():
            assert figures == pytest.approx(alone, rel=1e-12), ep


def test_both_losses_are_told_and_differ(alone: dict[str, float]) -> None:
    assert {"loss", "loss_looking_ahead", "bits_per_byte_looking_ahead"} <= alone.keys()
    assert abs(alone["loss"] - alone["loss_looking_ahead"]) > 1e-4
    for key in ("", "_looking_ahead"):
        bits = alone[f"loss{key}"] / np.log(2) * Store.num_tokens / Store.num_bytes
        assert alone[f"bits_per_byte{key}"] == pytest.approx(bits)


@pytest.mark.parametrize("most", VISITS)
def test_a_token_visits_the_ranks_of_its_groups_and_no_others(results, most: int) -> None:
    found = results[0][1][most]
    layers, steps = 2, len(RATES)
    assert sum(found.tokens_R) == layers * steps * BATCH * LENGTH and found.tokens_R[0] == 0
    assert found.most_ranks == abs(most)


def test_the_bytes_are_those_of_the_closed_form(results) -> None:
    for most, found in results[0][1].items():
        assert found.bytes_per_token == found.closed_bytes_per_token > 0, most
        assert all(on_rank[1][most] == found or on_rank[1][most].tokens_R == found.tokens_R for on_rank in results)
