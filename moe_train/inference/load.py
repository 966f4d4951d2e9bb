"""A trained model from its run folder, in any layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.checkpoint.reader import Checkpoint, open_at
from moe_train.checkpoint.runs import read_config
from moe_train.config.inference import InferenceConfig
from moe_train.config.inference_rules import inference_problems
from moe_train.config.rules import embedding_rows, layout_problems
from moe_train.config.schema import LayoutConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError
from moe_train.inference.offload.install import Offloaded, leave_on_disk
from moe_train.models.exchange import model_exchange
from moe_train.models.transformer import Transformer, build_model
from moe_train.parallel.state import model_parts


@dataclass(frozen=True)
class Trained:
    """A model read from a run.

    Attributes:
        config: of the training.
        tokenizer: of the training.
        model: with the checkpoint's weights, in evaluation mode.
        mesh: the layout that it is held in.
        checkpoint: where the weights come from.
        offloaded: the experts that stay on disk; None: everything is in memory.
    """

    config: TrainConfig
    tokenizer: Tokenizer
    model: Transformer
    mesh: Mesh
    checkpoint: Checkpoint
    offloaded: Offloaded | None = None

    def tell_traffic(self, world: World) -> None:
        """Say on the standard error what was read of experts on disk, if any are. Collective."""
        if self.offloaded is None:
            return
        line = self.offloaded.line()
        if world.is_leader:
            sys.stderr.write(f"{line}\n")


def load_trained(
    run_dir: Path, checkpoint: str, layout: LayoutConfig, world: World, inference: InferenceConfig | None = None
) -> Trained:
    """Read a model. Collective.

    Args:
        run_dir: folder of the run.
        checkpoint: ``latest``, or the path of a checkpoint.
        layout: how it is to lie on the ranks; need not be that of the training.
        world: the processes.
        inference: how the model is run; of it, whether experts stay on disk. None: everything is in memory.
    """
    inference = inference or InferenceConfig()
    world.leader_first(lambda: read_config(run_dir))
    config = read_config(run_dir)
    problems = list(layout_problems(layout.ep, config.model.ffn.num_experts, world.size, config.model))
    problems += inference_problems(inference, config.model)
    world.agree(ConfigError(problems) if problems else None)
    mesh = build_mesh(world, layout.ep)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json", config.tokenizer.boundary_token)
    source = open_at(run_dir if checkpoint == "latest" else Path(checkpoint).expanduser(), world)
    exchange = model_exchange(mesh, config.model, layout)
    vocab_size = embedding_rows(config.model, tokenizer.vocab_size)
    precision, offload = config.train.precision, inference.offload
    if offload is None:
        model = build_model(config.model, vocab_size, exchange, precision, world.device)
        source.fill(model_parts(model))
        return Trained(config, tokenizer, model.eval(), mesh, source)
    model = build_model(config.model, vocab_size, exchange, precision, torch.device("meta"))
    offloaded = leave_on_disk(model, source, offload, run_dir, world)
    return Trained(config, tokenizer, model.eval(), mesh, source, offloaded)
