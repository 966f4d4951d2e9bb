"""From a configuration to everything that a run holds."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ValidationError

from moe_train.checkpoint.background import BackgroundSaver, ForegroundSaver, Saver
from moe_train.checkpoint.compatibility import check_compatible
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import CHECKPOINTS, Checkpoint
from moe_train.config.model import HOW_NOT_WHAT, ModelConfig
from moe_train.config.rules import embedding_rows
from moe_train.config.schema import TrainConfig
from moe_train.config.task import LanguageTask
from moe_train.data.loader import StepLoader
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.models.exchange import model_exchange
from moe_train.models.transformer import Transformer
from moe_train.observe.environment import environment
from moe_train.parallel.build import Start, build_engine
from moe_train.parallel.deepspeed.settings import write_settings
from moe_train.parallel.engine import Engine
from moe_train.training.optim import build_optimizer
from moe_train.training.placement import Rebalancer
from moe_train.training.random import restore_random_state
from moe_train.training.tasks import Task, open_task
from moe_train.training.tasks.base import Texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a training run holds.

    Attributes:
        config: the validated configuration, completed by the task.
        world: the processes.
        mesh: their groups.
        task: what is learnt, with the texts.
        engine: model and optimizer.
        loader: this rank's batches, in an order that no layout changes.
        saver: publishes checkpoints.
        rebalancer: moves experts at checkpoints; None: they stay where they are.
        start_step: optimizer steps already done.
    """

    config: TrainConfig
    world: World
    mesh: Mesh
    task: Task
    engine: Engine
    loader: StepLoader
    saver: Saver
    rebalancer: Rebalancer | None
    start_step: int

    @property
    def texts(self) -> Texts:
        """Tokenizer, training texts and held-out texts."""
        return self.task.texts

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir).expanduser()

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.config.train.global_batch // (micro_batch(self.config, self.world) * self.world.size)


class Starter(Protocol):
    """Gives a model the first weights of the folder ``model.init_from``."""

    def __call__(self, model: Transformer, world: World, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Overwrite the model's values in place. Collective."""


def build_run(config: TrainConfig, world: World, starter: Starter) -> Run:
    """Prepare data, model and optimizer, and go on from a checkpoint when there is one. Collective.

    Args:
        config: validated.
        world: the processes.
        starter: for a run that begins with ``model.init_from``.

    Raises:
        ConfigError, DataError, CheckpointError: on all ranks alike.
    """
    folder = Path(config.run.dir).expanduser()
    world.leader_first(lambda: require_writable(folder))
    mesh = build_mesh(world, config.parallel.ep, config.parallel.dp_shard)
    task = open_task(config, world.leader_first)
    config = task.config
    manager = CheckpointManager(folder / CHECKPOINTS, world, mesh.layout, config.checkpoint.keep)
    checkpoint = manager.resume(config.checkpoint.resume)
    first = None
    if config.model.init_from and not checkpoint:
        first = partial(starter, world=world, config=config, tokenizer=task.texts.tokenizer)
    engine = start_engine(config, world, mesh, task.texts, first)
    if checkpoint is None:
        told = task.prepare(engine.model)
        if world.is_leader and told:
            logger.warning("%s", "\n".join(told))
    rebalancer = Rebalancer(engine, mesh) if config.parallel.placement == "auto" else None
    loader = task.loader(world, micro_batch(config, world))
    if checkpoint is not None:
        if rebalancer is not None:  # before tensors are read: it says which
            rebalancer.restore(checkpoint.trainer.get("layout", {}), world.is_leader)
        restore(checkpoint, identity(config, task.texts), engine, loader, world)
    loader.prefetch()
    saver: Saver = BackgroundSaver(manager) if config.checkpoint.background else ForegroundSaver(manager)
    run = Run(config, world, mesh, task, engine, loader, saver, rebalancer, checkpoint.step if checkpoint else 0)
    world.leader_first(lambda: describe(run))
    return run


def start_engine(config: TrainConfig, world: World, mesh: Mesh, texts: Texts, first: Start | None) -> Engine:
    """Build model and optimizer, with random first values or those that ``first`` gives. Collective."""
    vocab_size = embedding_rows(config.model, texts.tokenizer.vocab_size)
    exchange = model_exchange(mesh, config.model, config.parallel)
    make_optimizer = partial(build_optimizer, config=config.optim)
    return build_engine(config, mesh, world, exchange, vocab_size, make_optimizer, first)


def require_writable(folder: Path) -> None:
    """Refuse a run folder that cannot be made or written, before anything that takes long; makes nothing itself.

    Raises:
        ConfigError: a file is in its place or above it, or the folder belongs to somebody else.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        rule = f"{existing} is a file, not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        rule = f"{existing} may not be written"
    else:
        return
    raise ConfigError(Problem("run.dir", folder, rule, "choose another run.dir or run.name"))


def micro_batch(config: TrainConfig, world: World) -> int:
    """Return sequences per rank and forward pass."""
    return config.train.micro_batch or config.train.global_batch // world.size


def restore(checkpoint: Checkpoint, current: dict[str, Any], engine: Engine, loader: StepLoader, world: World) -> None:
    """Take weights, optimizer state, data position and random state from a checkpoint.

    Raises:
        CheckpointError: it belongs to another run; lists each difference.
    """
    check_compatible(completed(checkpoint.trainer["identity"]), current, allow=())
    parts = engine.parts()
    checkpoint.fill(parts)
    engine.adopt(parts)
    loader.load_state_dict(checkpoint.trainer["loader"])
    if checkpoint.random is not None:
        restore_random_state(checkpoint.random, world.device)


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in a checkpoint with the defaults of those keys that are younger than it."""
    try:
        model = ModelConfig.model_validate(saved.get("model"))
    except ValidationError:
        return saved  # the comparison tells what is wrong with it
    task = {"task": saved.get("task", LanguageTask().model_dump(mode="json"))}
    return {**saved, **task, "model": model.model_dump(mode="json", exclude=HOW_NOT_WHAT)}


def identity(config: TrainConfig, texts: Texts) -> dict[str, Any]:
    """Return what makes a run the run it is; everything else may change over its lives."""
    return {
        "run.seed": config.run.seed,
        "task": config.task.model_dump(mode="json"),
        "train.global_batch": config.train.global_batch,
        "train.precision": config.train.precision,
        "data.seq_len": config.data.seq_len,
        "data fingerprint": texts.fingerprint,
        "tokenizer fingerprint": texts.tokenizer.fingerprint,
        "model": config.model.model_dump(mode="json", exclude=HOW_NOT_WHAT),
    }


def describe(run: Run) -> None:
    """Write what the run is into its folder: configuration, environment, tokenizer."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # A tokenizer.json has no place for the name of the boundary token: it is kept with the configuration.
    tokenizer = run.config.tokenizer.model_copy(update={"boundary_token": run.texts.tokenizer.boundary_token})
    write_config(run.folder / "config.yaml", run.config.model_copy(update={"tokenizer": tokenizer}))
    if run.config.parallel.engine == "deepspeed":
        write_settings(run.folder / "deepspeed.json", run.config, run.world.size)
    device = None if run.world.device.type == "cpu" else {"device": str(run.world.device)}
    (run.folder / "environment.json").write_text(json.dumps(environment(device), indent=1) + "\n")
    run.texts.tokenizer.save(run.folder / "tokenizer.json")


def write_config(path: Path, config: BaseModel) -> None:
    """Write a resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
