"""First weights from a run of one's own, whose model need not be the same: a classifier may begin as a language model.

What both models call alike and is of one shape is taken; the rest begins with random values, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.runs import TOKENIZER, read_config
from moe_train.checkpoint.state import sizes_of
from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.interop.agreement import reading, shortened
from moe_train.models.transformer import Transformer
from moe_train.parallel.state import model_parts

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
HEAD = "model.head."
"""Beginning of the keys of what turns vectors into scores: of tokens, or of classes."""
OWN_WORDS = ("model.naive_bayes.", "model.lexicon.")
"""Beginnings of the keys of what a run's own training texts, or its own list of words, tell."""


@dataclass(frozen=True)
class Taking:
    """Which tensors of a run a model begins with, by key.

    Attributes:
        taken: those of the same shape in both.
        fresh: the model's that keep their first values.
        left: the run's that the model has no place for.
    """

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]


def load_from_run(model: Transformer, world: World, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Overwrite initial values with those of the newest good checkpoint of the run ``model.init_from``. Collective.

    Args:
        model: as this rank holds it, with initial values.
        world: the processes.
        config: of the training.
        tokenizer: of the training.

    Raises:
        ConfigError: another tokenizer, tensors of other shapes (all are listed), or nothing in common.
        DataError, CheckpointError: the run cannot be read.
    """
    run_dir = Path(str(config.model.init_from)).expanduser()
    theirs = reading(world, lambda: read_config(run_dir))
    their_tokenizer = reading(
        world, lambda: Tokenizer.load(run_dir / TOKENIZER, theirs.tokenizer.boundary_token).fingerprint
    )
    source = open_at(run_dir, world)
    saved = reading(world, lambda: sizes_of(read_metadata(source.path, source.manifest)))
    parts = model_parts(model)
    ours = {key: part.shape for key, part in parts.items() if 0 not in part.shape}
    taking, problems = plan(ours, saved, same_head(config, theirs))
    if their_tokenizer != tokenizer.fingerprint:
        problems = [other_tokenizer(run_dir), *problems]
    world.agree(ConfigError(problems) if problems else None)
    if world.is_leader:
        logger.warning("%s", told(run_dir, source.step, taking))
    source.fill({key: parts[key] for key in taking.taken}, partial=True)


def plan(ours: Shapes, saved: Shapes, takes_head: bool) -> tuple[Taking, list[Problem]]:
    """Return what is taken, and what stands in the way of it.

    Args:
        ours: shapes of the model's tensors by key, ``model.<fqn>``.
        saved: shapes of the checkpoint's tensors, those of the optimizer too.
        takes_head: whether the heads of both score the same things.
    """
    model_keys = {key for key in saved if key.startswith("model.") and 0 not in saved[key]}
    model_keys = {key for key in model_keys if not key.startswith(OWN_WORDS)}
    shared = {key for key in ours.keys() & model_keys if takes_head or not key.startswith(HEAD)}
    problems = [
        Problem(
            key.removeprefix("model."),
            None,
            f"has shape {saved[key]} in model.init_from, not {ours[key]}",
            "configure the model as in the config.yaml of that run",
        )
        for key in sorted(shared)
        if saved[key] != ours[key]
    ]
    if not shared:
        rule = "that run's model has no tensor in common with this one"
        problems.append(Problem("model.init_from", None, rule, "choose a run of a similar model"))
    taking = Taking(*(tuple(sorted(keys)) for keys in (shared, ours.keys() - shared, model_keys - shared)))
    return taking, shortened(problems, "tensors of other shapes")


def same_head(ours: TrainConfig, theirs: TrainConfig) -> bool:
    """Whether the heads of two runs score the same things: tokens, or the same classes in the same order."""
    if isinstance(ours.task, SentimentTask) and isinstance(theirs.task, SentimentTask):
        return ours.task.classes == theirs.task.classes
    return ours.task.kind == theirs.task.kind


def other_tokenizer(run_dir: Path) -> Problem:
    """Return the problem of a run whose tokens mean something else."""
    rule = f"is not the tokenizer of {run_dir}: its embedding would mean other words"
    return Problem("tokenizer", None, rule, f"set tokenizer.kind=file tokenizer.path={run_dir / TOKENIZER}")


def told(run_dir: Path, step: int, taking: Taking) -> str:
    """Return the sentence that says what was taken and what was not."""
    sentence = f"began from step {step} of {run_dir}: {len(taking.taken)} tensors are taken"
    if taking.fresh:
        sentence += f"; {names(taking.fresh)} begin with random values"
    if taking.left:
        sentence += f"; {names(taking.left)} are not used"
    return sentence


def names(keys: Iterable[str], most: int = 8) -> str:
    """Return tensors by name, a long list cut."""
    listed = [key.removeprefix("model.") for key in keys]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
