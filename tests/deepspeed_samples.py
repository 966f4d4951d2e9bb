"""Runs the product's training step with either engine on one model, and gathers what the ranks hold afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from layouts import BATCH, VOCAB, Case, rank_batches
from oracle import BOUNDARY, IGNORE
from torch import Tensor

from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.deepspeed.build import build_deepspeed
from moe_train.parallel.engine import Engine, TorchEngine
from moe_train.parallel.remat import apply_remat
from moe_train.training.optim import build_optimizer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

CASE = Case("top-2")
RATES = [1e-2, 2e-2, 1e-2, 5e-3]


@dataclass(frozen=True)
class Trial:
    """One engine on one layout.

    Attributes:
        ep: expert-parallel size.
        stage: of ZeRO; None: the engine of torch.
        accumulation: micro-batches per step and rank.
        overrides: of the configuration of the case.
        case: the model and the batches.
        offload: whether the optimizer state is kept by the host.
    """

    ep: int = 1
    stage: int | None = None
    accumulation: int = 1
    overrides: tuple[str, ...] = ()
    case: Case = CASE
    offload: bool = False

    @property
    def config(self) -> TrainConfig:
        """Without the layout."""
        return composed(("train.precision=fp32", *self.case.overrides, *self.overrides))

    def config_on(self, world_size: int) -> TrainConfig:
        """With the batch that the cases have, cut for this number of ranks."""
        rows = BATCH // (world_size * self.accumulation)
        config = self.config
        train = config.train.model_copy(update={"global_batch": BATCH, "micro_batch": rows})
        parallel = {"ep": self.ep, "engine": "torch" if self.stage is None else "deepspeed"}
        parallel |= {"zero_stage": 1 if self.stage is None else self.stage, "offload": self.offload}
        return config.model_copy(update={"train": train, "parallel": config.parallel.model_copy(update=parallel)})


@cache
def composed(keys: tuple[str, ...]) -> TrainConfig:
    """Once per process, for many trials."""
    return Case("", keys).config()


def engine_on(world: World, mesh: Mesh, trial: Trial) -> Engine:
    config = trial.config_on(world.size)
    exchange = exchange_for(mesh, config.model.ffn.num_experts, getattr(config.model.ffn.capacity, "pad", False))
    model = build_model(config.model, VOCAB, exchange, config.train.precision, world.device)
    model = trial.case.prepare(model).to(world.device)
    apply_remat(model, config.parallel.remat)
    optimizer = build_optimizer(model, config.optim)
    if trial.stage is None:
        return TorchEngine(model, optimizer, mesh)
    return build_deepspeed(config, mesh, world, model, optimizer)


def train(engine: Engine, mesh: Mesh, trial: Trial, steps: range) -> tuple[list[float], list[float]]:
    """Train for these steps; losses and norms."""
    losses, norms = [], []
    config, batches = trial.config_on(mesh.layout.world_size), trial.case.batches()
    for step in steps:
        batch = batches[step % len(batches)]
        tokens = int((batch[1] != IGNORE).sum())
        micro_batches = rank_batches(batch, mesh.rank, mesh.layout.world_size, trial.accumulation)
        settings = replace(settings_at(step, config, BOUNDARY), learning_rate=RATES[step])
        result = train_step(engine, mesh, micro_batches, tokens, settings)
        losses.append(result.tally.measure(tokens, mesh)["loss"])
        norms.append(result.grad_norm.item())
    return losses, norms


def whole(parts: dict[str, Part]) -> dict[str, Tensor]:
    """The tensors that the parts of all ranks make up, on every rank. Each value must be held by some rank."""
    boxes = {key: [(box.offsets, box.values.cpu().clone()) for box in part.boxes] for key, part in parts.items()}
    of_all: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, boxes)
    tensors = {}
    for key, part in parts.items():
        found = [box for of_rank in of_all for box in of_rank[key]]
        full = torch.full(part.shape, torch.nan, dtype=found[0][1].dtype)
        for offsets, values in found:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            full[place] = values
        assert not full.isnan().any(), f"{key} has values that no rank holds"
        tensors[key] = full
    return tensors


@dataclass(frozen=True)
class Trained:
    """What a trial did.

    Attributes:
        losses: per step.
        norms: per step.
        state: whole tensors of weights, buffers and optimizer state.
        weights: parameters of the model as it computes with them, this rank's.
    """

    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    weights: dict[str, Tensor]


def outcome(world: World, trial: Trial, steps: int = 4) -> Trained:
    """Train on this world and gather."""
    mesh = build_mesh(world, trial.ep)
    engine = engine_on(world, mesh, trial)
    losses, norms = train(engine, mesh, trial, range(steps))
    weights = {name: p.detach().cpu().clone() for name, p in engine.model.named_parameters()}
    return Trained(losses, norms, whole(engine.parts()), weights)


def outcomes(world: World, trials: list[Trial]) -> list[Trained]:
    """Several, one after the other."""
    torch.set_num_threads(1)
    return [outcome(world, trial) for trial in trials]


def distances(found: Trained, truth: Trained) -> dict[str, float]:
    """How far each number and tensor is from the truth, relative to its size."""
    pairs = {"loss": (found.losses, truth.losses), "norm": (found.norms, truth.norms)}
    errors = {
        key: max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*pair, strict=True)) for key, pair in pairs.items()
    }
    assert found.state.keys() == truth.state.keys(), found.state.keys() ^ truth.state.keys()
    for key, b in truth.state.items():
        errors[key] = float((found.state[key].double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-2))
    return errors
