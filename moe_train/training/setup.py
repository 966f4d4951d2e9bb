"""From a configuration to everything that a run holds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ValidationError

from moe_train.checkpoint.compatibility import check_compatible
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import CHECKPOINTS, Checkpoint
from moe_train.config.model import ModelConfig
from moe_train.config.rules import embedding_rows
from moe_train.config.schema import TrainConfig
from moe_train.data.corpus import Corpus, open_corpus
from moe_train.data.loader import TrainLoader
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import exchange_for
from moe_train.observe.environment import environment
from moe_train.parallel.engine import Engine, TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.random import restore_random_state


@dataclass(frozen=True)
class Run:
    """What a training run holds.

    Attributes:
        config: the validated configuration.
        world: the processes.
        mesh: their groups.
        corpus: tokenizer, training text and held-out text.
        engine: model and optimizer.
        loader: this rank's batches, in an order that no layout changes.
        manager: checkpoints.
        start_step: optimizer steps already done.
    """

    config: TrainConfig
    world: World
    mesh: Mesh
    corpus: Corpus
    engine: Engine
    loader: TrainLoader
    manager: CheckpointManager
    start_step: int

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

    def __call__(self, model: Transformer, world: World, seed: int) -> None:
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
    world.leader_first(lambda: require_writable(Path(config.run.dir).expanduser()))
    mesh = build_mesh(world, config.parallel.ep, config.parallel.dp_shard)
    corpus = open_corpus(config.data, config.tokenizer, world.leader_first)
    exchange = exchange_for(mesh, config.model.ffn.num_experts, is_padded(config.model.ffn.capacity))
    vocab_size = embedding_rows(config.model, corpus.tokenizer.vocab_size)
    model = build_model(config.model, vocab_size, exchange, config.train.precision, world.device)
    initialise(model, config.run.seed)
    engine = TorchEngine(model, build_optimizer(model, config.optim), mesh)
    loader = TrainLoader(
        corpus.train,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch(config, world),
        rank=world.rank,
        world_size=world.size,
        seed=config.run.seed,
    )
    manager = CheckpointManager(
        Path(config.run.dir).expanduser() / CHECKPOINTS, world, mesh.layout, config.checkpoint.keep
    )
    checkpoint = manager.resume(config.checkpoint.resume)
    if checkpoint is None and config.model.init_from is not None:
        starter(model, world, config.run.seed)
    if checkpoint is not None:
        restore(checkpoint, identity(config, corpus), engine, loader, world)
    run = Run(config, world, mesh, corpus, engine, loader, manager, checkpoint.step if checkpoint else 0)
    world.leader_first(lambda: describe(run))
    return run


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


def restore(checkpoint: Checkpoint, current: dict[str, Any], engine: Engine, loader: TrainLoader, world: World) -> None:
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
    """Return the identity in a checkpoint with the defaults of those keys of the model that are younger than it."""
    try:
        model = ModelConfig.model_validate(saved.get("model"))
    except ValidationError:
        return saved  # the comparison tells what is wrong with it
    return {**saved, "model": model.model_dump(mode="json")}


def identity(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Return what makes a run the run it is; everything else may change over its lives."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch": config.train.global_batch,
        "train.precision": config.train.precision,
        "data.seq_len": config.data.seq_len,
        "data fingerprint": corpus.fingerprint,
        "tokenizer fingerprint": corpus.tokenizer.fingerprint,
        "model": config.model.model_dump(mode="json"),
    }


def describe(run: Run) -> None:
    """Write what the run is into its folder: configuration, environment, tokenizer."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # A tokenizer.json has no place for the name of the boundary token: it is kept with the configuration.
    tokenizer = run.config.tokenizer.model_copy(update={"boundary_token": run.corpus.tokenizer.boundary_token})
    write_config(run.folder / "config.yaml", run.config.model_copy(update={"tokenizer": tokenizer}))
    device = None if run.world.device.type == "cpu" else {"device": str(run.world.device)}
    (run.folder / "environment.json").write_text(json.dumps(environment(device), indent=1) + "\n")
    run.corpus.tokenizer.save(run.folder / "tokenizer.json")


def write_config(path: Path, config: BaseModel) -> None:
    """Write a resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
