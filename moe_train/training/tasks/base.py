"""What every task gives to the training."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from moe_train.config.schema import TrainConfig
from moe_train.data.loader import StepLoader
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer

Figures: TypeAlias = dict[str, Any]
"""What an evaluation found, by the keys of a record of kind ``eval``: numbers, lists, names."""


def own_steps(config: TrainConfig, world: World, micro_batch: int) -> dict[str, int]:
    """Return what a loader has to know of the batches, and which part of them is this rank's.

    Args:
        config: of the run.
        world: the processes.
        micro_batch: sequences per rank and forward pass.
    """
    return {
        "seq_len": config.data.seq_len,
        "global_batch": config.train.global_batch,
        "micro_batch": micro_batch,
        "rank": world.rank,
        "world_size": world.size,
        "seed": config.run.seed,
    }


class Texts(Protocol):
    """What the texts of every task have."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Made their tokens."""

    @property
    def fingerprint(self) -> str:
        """Equal when texts, split and tokenizer are."""


class Task(Protocol):
    """What a run learns from its texts, which are open on this rank."""

    @property
    def config(self) -> TrainConfig:
        """Of the run, completed by what only the texts could tell."""

    @property
    def texts(self) -> Texts:
        """The texts."""

    @property
    def writes_text(self) -> bool:
        """Whether its models continue texts."""

    def prepare(self, model: Transformer) -> list[str]:
        """Give a new model those values that its texts, and files beside them, determine; the same on all ranks.

        Returns:
            What to tell of them, in lines.

        Raises:
            DataError: a file that cannot be used.
        """

    def loader(self, world: World, micro_batch: int) -> StepLoader:
        """Return this rank's batches for training, from the first step on.

        Args:
            world: the processes.
            micro_batch: sequences per rank and forward pass.

        Raises:
            DataError: fewer texts than one global batch.
        """

    def told_size(self) -> str:
        """Return in words how much there is to train on."""

    def tokens_after(self, step: int) -> int:
        """Return the tokens that so many optimizer steps take over all ranks, on average over an epoch."""

    def evaluate(self, model: Transformer, world: World, mesh: Mesh, micro_batch: int, limit: int | None) -> Figures:
        """Return the figures of the held-out texts; none when nothing is held out. Collective.

        Args:
            model: as this rank holds it; training mode is restored afterwards.
            world: the processes.
            mesh: their groups.
            micro_batch: sequences per rank and forward pass.
            limit: forward passes; None: all held-out texts.
        """

    def closing(self, final: Figures) -> list[str]:
        """Return what to tell of the final evaluation, which found something, in lines."""
