"""Runs to test experts on disk with: untrained models, saved as a training saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import CHECKPOINTS
from moe_train.checkpoint.state import CheckpointState
from moe_train.config.compose import compose_config
from moe_train.config.inference import InferenceConfig, OffloadConfig
from moe_train.config.schema import LayoutConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World
from moe_train.inference.load import Trained, load_trained
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.state import model_parts
from moe_train.training.setup import write_config

SMALL = [
    "model.dim=32", "model.layers=2", "model.heads=2", "model.attention.kv_heads=1", "model.ffn.num_experts=8",
    "model.ffn.expert_dim=32", "model.init_std=0.3", "tokenizer=bytes", "data.seq_len=24",
]  # fmt: skip
FAMILIES = {
    "two of eight": [],
    "shared, every other layer, a module ahead": [
        "model.ffn.num_shared_experts=1", "model.ffn.every=2", "model.mtp.depth=1", "model.tie_embeddings=false",
    ],
    "biases, clamped": ["model.ffn.expert_bias=true", "model.ffn.expert_activation=swiglu_clamped"],
    "loss-free sigmoid": ["model.ffn.router.kind=sigmoid", "model.ffn.balance.loss_free.rate=0.05"],
    "hash": ["model.ffn.router.kind=hash", "model.ffn.top_k=1"],
    "expert choice": ["model.ffn.router.kind=expert_choice"],
}  # fmt: skip


def config_of(*keys: str) -> TrainConfig:
    """The configuration of a small run; its rules are not asked."""
    config = compose_config("train", TrainConfig, lambda config: [], [*SMALL, *keys])
    boundary = {"boundary_token": Tokenizer.of_bytes().boundary_token}
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update=boundary)})


def save_run(
    folder: Path, world: World, *keys: str, seed: int = 0, step: int = 1, ep: int = 1,
    fill: Callable[[Transformer], None] | None = None,
) -> None:  # fmt: skip
    """Write a run folder with one more checkpoint. Collective."""
    config, tokenizer = config_of(*keys), Tokenizer.of_bytes()
    mesh, ffn = build_mesh(world, ep), config.model.ffn
    exchange = exchange_for(mesh, ffn.num_experts, padded=False)
    model = build_model(config.model, tokenizer.vocab_size, exchange, config.train.precision, world.device)
    if fill is None:
        initialise(model, seed)
    else:
        fill(model)
    if world.is_leader:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / "config.yaml", config)
        tokenizer.save(folder / "tokenizer.json")
    world.barrier()
    manager = CheckpointManager(folder / CHECKPOINTS, world, mesh.layout, keep=5)
    manager.save(step, CheckpointState(model_parts(model), {"step": step}, None))


def loaded(folder: Path, world: World, cached: int | None, ep: int = 1, records: Path | None = None) -> Trained:
    """The run's latest model, with experts on disk unless ``cached`` is None. Collective."""
    offload = None if cached is None else OffloadConfig(cached=cached, folder=None if records is None else str(records))
    return load_trained(folder, "latest", LayoutConfig(ep=ep), world, InferenceConfig(offload=offload))


@torch.no_grad()
def logits_of(trained: Trained, seed: int = 0) -> torch.Tensor:
    """The scores of a few random texts."""
    tokens_BS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(seed))
    logits_BSV: torch.Tensor = trained.model(tokens_BS).logits_BSV
    return logits_BSV
