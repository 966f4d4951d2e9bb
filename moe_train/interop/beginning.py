"""The first weights of a training that names them: a folder of the rest of the world, or a run of one's own."""

from __future__ import annotations

from pathlib import Path

from moe_train.checkpoint.runs import is_run
from moe_train.config.schema import TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.world import World
from moe_train.interop.from_run import load_from_run
from moe_train.interop.start import load_first_weights
from moe_train.models.transformer import Transformer


def begin(model: Transformer, world: World, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Overwrite initial values with those of ``model.init_from``. Collective.

    Args:
        model: as this rank holds it, with initial values.
        world: the processes.
        config: of the training, with the names of its classes, if it has some.
        tokenizer: of the training.

    Raises:
        ConfigError: the folder's model does not fit the configured one, or not its tokenizer.
        DataError, CheckpointError: the folder is damaged.
    """
    assert config.model.init_from is not None, "there is nothing to start from"
    folder = Path(config.model.init_from).expanduser()
    if world.broadcast(is_run(folder)):
        load_from_run(model, world, config, tokenizer)
    else:
        load_first_weights(model, world, config.run.seed)
