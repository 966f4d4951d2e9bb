"""From a configuration to an engine, without ever holding more of a large model than a rank's share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.initialise import initialise
from moe_train.models.transformer import PRECISIONS, Transformer, build_model
from moe_train.moe.exchange import Exchange
from moe_train.ops.pointwise import fuse
from moe_train.parallel.compile import apply_compile
from moe_train.parallel.engine import Engine, TorchEngine
from moe_train.parallel.remat import apply_remat
from moe_train.parallel.shard import give_memory, shard

MakeOptimizer: TypeAlias = Callable[[nn.Module], torch.optim.Optimizer]
Start: TypeAlias = Callable[[Transformer], None]


def build_engine(
    config: TrainConfig,
    mesh: Mesh,
    world: World,
    exchange: Exchange,
    vocab_size: int,
    make_optimizer: MakeOptimizer,
    starter: Start | None,
) -> Engine:
    """Build model and optimizer with first values. Collective. What ``train.compile`` fuses, the process fuses.

    Args:
        config: validated.
        mesh: the groups.
        world: the processes.
        exchange: brings tokens to experts; says which are held here.
        vocab_size: rows of the embedding.
        make_optimizer: over the parameters as this rank holds them.
        starter: overwrites the values of a model in place; None: they stay random. Collective.
    """

    def build(device: torch.device) -> Transformer:
        model = build_model(config.model, vocab_size, exchange, config.train.precision, device)
        fuse(None if config.train.compile == "none" else "inductor")
        model.loss_chunk = config.train.loss_chunk
        if config.train.compile == "block":
            apply_compile(model)
        apply_remat(model, config.parallel.remat)
        return model

    if config.parallel.engine == "deepspeed":
        from moe_train.parallel.deepspeed.build import build_deepspeed  # an optional dependency

        model = filled(build(world.device), config.run.seed, starter)
        return build_deepspeed(config, mesh, world, model, make_optimizer(model))
    if mesh.sharding is None:
        model = filled(build(world.device), config.run.seed, starter)
    elif starter is None:
        model = build(torch.device("meta"))
        shard(model, mesh, gather_dtype(config), config.parallel.offload)
        give_memory(model, world.device, config.parallel.offload)
        initialise(model, config.run.seed)
    else:
        # What starts a model knows plain tensors. The weights (nothing else) are then whole in the host's memory, as
        # far as they are this rank's: until they are cut.
        model = filled(build(torch.device("cpu")), config.run.seed, starter)
        shard(model, mesh, gather_dtype(config), config.parallel.offload)
    return TorchEngine(model, make_optimizer(model), mesh)


def filled(model: Transformer, seed: int, starter: Start | None) -> Transformer:
    """Return a model that is not sharded with its first values."""
    initialise(model, seed)
    if starter is not None:
        starter(model)
    return model


def gather_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the dtype in which experts' weights travel; None: that in which they are kept.

    Where a pass uses them several times, their gradients are added up in this dtype; without sharding it is in that of
    the weights. Then they travel as they are kept, so that values do not depend on the layout.
    """
    formats = PRECISIONS[config.train.precision]
    is_cast = formats.activations != formats.weights
    return formats.activations if is_cast and config.parallel.overlap == 1 else None
