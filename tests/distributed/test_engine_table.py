"""The layout contract over engines and shardings: one run, whatever executes it and however it is cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from deepspeed_samples import whole
from layouts import BATCH, VOCAB, Case, rank_batches
from oracle import BOUNDARY, IGNORE
from spawn import run_ranks
from torch import Tensor

from moe_train.config.deepspeed_rules import deepspeed_problems
from moe_train.config.exchange_rules import exchange_problems
from moe_train.config.remat_rules import remat_problems
from moe_train.config.schema import TrainConfig
from moe_train.config.shard_rules import shard_problems
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.build import build_engine
from moe_train.training.optim import build_optimizer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

STEPS, ACCUMULATION = 5, 2
MODEL = (
    "router.kind=sigmoid", "balance.loss_free.rate=0.05", "model.ffn.num_shared_experts=1", "model.ffn.top_k=2",
    f"train.steps={STEPS}", "optim.warmup_steps=2", "optim.lr=0.01", "optim.router_lr_ratio=0.5",
)  # fmt: skip
WAYS = {
    "torch": (),
    "torch, dp_shard 2": ("parallel.dp_shard=2",),
    "torch, dp_shard 4, selective remat": ("parallel.dp_shard=4", "parallel.remat=selective"),
    "torch, selective remat": ("parallel.remat=selective",),
    "torch, full remat": ("parallel.remat=full",),
    "torch, allgather": ("parallel.exchange=allgather",),
    "torch, hierarchical": ("parallel.exchange=hierarchical", "parallel.node_size=2"),
    "torch, alltoall in 2 parts": ("parallel.exchange=alltoall", "parallel.overlap=2"),
    "torch, hierarchical in 2 parts, dp_shard 2, full remat": (
        "parallel.exchange=hierarchical", "parallel.node_size=2", "parallel.overlap=2", "parallel.dp_shard=2",
        "parallel.remat=full",
    ),
    "deepspeed, ZeRO 0": ("parallel.engine=deepspeed", "parallel.zero_stage=0"),
    "deepspeed, ZeRO 1": ("parallel.engine=deepspeed",),
    "deepspeed, ZeRO 2": ("parallel.engine=deepspeed", "parallel.zero_stage=2"),
}  # fmt: skip
RULES = (shard_problems, exchange_problems, deepspeed_problems, remat_problems)
Key = tuple[str, int, str]
"""Way, EP size, precision."""
State = tuple[list[list[float]], dict[str, Tensor]]
"""Loss, balance loss and norm by step; weights, moments and biases, whole."""


def config_of(way: str, ep: int, precision: str, world_size: int) -> TrainConfig:
    """A row of the table on so many ranks."""
    keys = [*MODEL, *WAYS[way], f"parallel.ep={ep}", f"train.precision={precision}"]
    config = Case("", tuple(keys)).config()
    train = {"global_batch": BATCH, "micro_batch": BATCH // (world_size * ACCUMULATION)}
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def table(world_size: int) -> list[Key]:
    """The rows that the product accepts on so many ranks; fp64 where the engine can."""
    rows = []
    for way, ep in product(WAYS, (1, 2, 4)):
        precision = "fp32" if way.startswith("deepspeed") else "fp64"
        fits = world_size % ep == 0 and (ep == 4 or "hierarchical" not in way)
        config = config_of(way, ep, precision, world_size) if fits else None
        if config is not None and not [problem for rule in RULES for problem in rule(config, world_size)]:
            rows.append((way, ep, precision))
    return rows


def trained(world: World, way: str, ep: int, precision: str) -> State:
    """Five steps, by the way that a run takes from its configuration to an engine."""
    config = config_of(way, ep, precision, world.size)
    mesh = build_mesh(world, ep, config.parallel.dp_shard)
    exchange = exchange_for(mesh, config.model.ffn.num_experts, False, config.parallel, config.model.ffn.top_k)
    engine = build_engine(config, mesh, world, exchange, VOCAB, partial(build_optimizer, config=config.optim), None)
    figures, batches = [], Case("", ()).batches()
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        tokens = int((batch[1] != IGNORE).sum())
        micro_batches = rank_batches(batch, world.rank, world.size, ACCUMULATION)
        settings = replace(settings_at(step, config, BOUNDARY))
        result = train_step(engine, mesh, micro_batches, tokens, settings)
        measured = result.tally.measure(tokens, mesh)
        figures.append([measured["loss"], measured["aux_loss"], result.grad_norm.item()])
    return figures, whole(engine.parts())


def wrong_on(world: World, rows: list[Key], truths: dict[str, State]) -> dict[Key, list[str]]:
    """What differs from one process, by row."""
    torch.set_num_threads(1)
    return {row: differences(trained(world, *row), truths[row[2]], row[2]) for row in rows}


def differences(found: State, truth: State, precision: str) -> list[str]:
    """What is further from the truth than the contract allows, relative to the size of the number or tensor."""
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}[precision]
    pairs = {
        f"figures of step {n}": (torch.tensor(a), torch.tensor(b))
        for n, (a, b) in enumerate(zip(found[0], truth[0], strict=True))
    }
    assert found[1].keys() == truth[1].keys(), found[1].keys() ^ truth[1].keys()
    pairs |= {key: (found[1][key], value) for key, value in truth[1].items()}
    errors = {
        key: float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-2))
        for key, (a, b) in pairs.items()
    }
    return [f"{key} differs by {error:.1e}" for key, error in errors.items() if not error <= tolerance]


@pytest.fixture(scope="module")
def truths() -> dict[str, State]:
    """One process with torch's engine."""
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        return {precision: trained(world, "torch", 1, precision) for precision in ("fp64", "fp32")}


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_engine_and_sharding_is_the_run_of_one_process(truths: dict[str, State], world_size: int) -> None:
    rows = table(world_size)
    assert {"torch", "deepspeed, ZeRO 0", "deepspeed, ZeRO 1", "deepspeed, ZeRO 2"} <= {way for way, _, _ in rows}
    assert world_size < 4 or {way for way, _, _ in rows} == set(WAYS)
    for rank, wrong in enumerate(run_ranks(wrong_on, world_size, rows, truths, timeout_s=600)):
        assert wrong == {row: [] for row in rows}, f"rank {rank}"
