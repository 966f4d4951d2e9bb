"""Shards kept in the host's memory: the same training, and no shard that is kept elsewhere."""

from __future__ import annotations

from functools import partial

import torch
from layouts import BOUNDARY, VOCAB, Case, gathered, rank_batches
from spawn import run_ranks
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.build import build_engine
from moe_train.parallel.engine import TorchEngine
from moe_train.parallel.shard import device_of, place_of, units_of
from moe_train.training.optim import build_optimizer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

CASES = [
    Case("top-2, shared expert, a module ahead, loss-free",
         ("model.mtp.depth=1", "model.ffn.num_shared_experts=1", "balance.loss_free.rate=0.05")),
    Case("graph of networks", ("model=graph_tiny", "model.layers=1")),
    Case("graph of blocks", ("model=graph_block_tiny", "model.layers=1")),
]  # fmt: skip


def started(model: Transformer) -> None:
    """What starts a model from a folder finds it whole."""
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    initialise(model, 3)


def engine_of(world: World, mesh: Mesh, case: Case, offload: bool, with_start: bool) -> TorchEngine:
    config = case.config()
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"offload": offload})})
    exchange = exchange_for(mesh, config.model.ffn.num_experts, padded=False)
    make_optimizer = partial(build_optimizer, config=config.optim)
    start = started if with_start else None
    engine = build_engine(config, mesh, world, exchange, VOCAB, make_optimizer, start)
    assert isinstance(engine, TorchEngine)
    return engine


def trained(world: World, mesh: Mesh, case: Case, engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Norms, weights, gradients and moments after two steps of two micro-batches."""
    config, found = case.config(), {}
    for step, batch in zip(range(2), case.batches(), strict=False):
        batches = rank_batches(batch, mesh.rank, world.size, 2)
        settings = settings_at(step, config, BOUNDARY)
        result = train_step(engine, mesh, batches, batch[0].numel(), settings)
        found[f"norm {step}"] = result.grad_norm
    state = engine.optimizer.state
    for name, of in {
        "weight": lambda p: p, "gradient": lambda p: p.grad, "moment": lambda p: state[p]["exp_avg"],
    }.items():  # fmt: skip
        found |= {f"{name} {key}": value for key, value in gathered(engine.model, mesh, of).items()}
    return found | {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


def places(engine: TorchEngine) -> set[tuple[str, bool]]:
    """How units keep their shards: the policy's name, and whether each parameter goes to the host."""
    found = set()
    for unit in units_of(engine.model):
        group = unit._get_fsdp_state()._fsdp_param_group
        if group is not None:
            name = type(group.offload_policy).__name__
            found |= {(name, parameter.offload_to_cpu) for parameter in group.fsdp_params}
    return found


def wrong_on(world: World) -> list[str]:
    torch.set_num_threads(1)
    wrong = []
    for ep in (1, 2):
        mesh = build_mesh(world, ep, 2)
        for case in CASES:
            for with_start in (False, True) if case is CASES[0] else (False,):
                plain, moved = (engine_of(world, mesh, case, offload, with_start) for offload in (False, True))
                where = f"{case.name}, ep {ep}, start {with_start}"
                if places(plain) != {("OffloadPolicy", False)} or places(moved) != {("CPUOffloadPolicy", True)}:
                    wrong.append(f"{where}: {places(plain)} {places(moved)}")
                if any(not isinstance(parameter, DTensor) for parameter in moved.model.parameters()):
                    wrong.append(f"{where}: a parameter is not sharded")
                if device_of(moved.model, mesh).type != "cpu":
                    wrong.append(f"{where}: {device_of(moved.model, mesh)}")
                truth, found = (trained(world, mesh, case, engine) for engine in (plain, moved))
                wrong += [f"{where}: {key}" for key in truth if not torch.equal(truth[key], found[key])]
                if len(truth) < 20 or not truth["norm 1"] > 0:
                    wrong.append(f"{where}: nothing to compare")
    return wrong


def test_training_with_shards_on_the_host_is_the_same_bit_for_bit() -> None:
    assert run_ranks(wrong_on, 2) == [[], []]


def test_memory_is_pinned_only_where_there_is_a_device(monkeypatch) -> None:
    for has_device in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda has_device=has_device: has_device)
        place = place_of(True)
        assert isinstance(place, CPUOffloadPolicy) and place.pin_memory is has_device
        assert not isinstance(place_of(False), CPUOffloadPolicy)
