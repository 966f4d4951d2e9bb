"""What agents must have in common before their figures may stand beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from torch import Tensor

from moe_train.errors import ConfigError, DataError, Problem


@dataclass(frozen=True)
class Reader:
    """How much a model reads at once.

    Attributes:
        seq_len: positions that it was trained on.
        max_positions: beyond which it cannot read at all; None: no such limit.
    """

    seq_len: int
    max_positions: int | None


def common(values: Mapping[str, str], leaf: str, what: str) -> str:
    """Return the name of the first agent, after making sure that all have the same value.

    Args:
        values: by agent.
        leaf: key of an agent that a problem points to.
        what: they should have in common, in words.

    Raises:
        DataError: one problem per agent that differs from the first.
    """
    first = next(iter(values))
    is_plural = what.endswith(("texts", "classes"))
    remedy = f"score runs that share {'them' if is_plural else 'it'}"
    if what in ("corpus", "held-out texts"):
        remedy += ", or name the one whose held-out text is used: score.heldout_of=NAME"
    problems = [
        Problem(
            f"mixture.agents.{name}.{leaf}",
            None,
            f"its {what} differ{'' if is_plural else 's'} from {first}'s",
            remedy,
        )
        for name, value in values.items()
        if value != values[first]
    ]
    if problems:
        raise DataError(problems)
    return first


def require_task(tasks: Mapping[str, str], wanted: Literal["language", "sentiment"], mode: str) -> None:
    """Refuse runs that learnt something else.

    Args:
        tasks: kind of the task, by agent.
        wanted: what all must be.
        mode: that needs it.

    Raises:
        DataError: one problem per agent.
    """
    needed = {"language": "a language model (task=language)", "sentiment": "a classifier (task=sentiment)"}[wanted]
    problems = [
        Problem(f"mixture.agents.{name}.dir", None, f"mode={mode} needs {needed}, and this is none", "name another run")
        for name, task in tasks.items()
        if task != wanted
    ]
    if problems:
        raise DataError(problems)


def common_length(readers: Mapping[str, Reader], wanted: int | None) -> int:
    """Return the positions per sequence at which all models are scored.

    Args:
        readers: by agent.
        wanted: what the user set; None: the shortest that a model was trained on.

    Raises:
        ConfigError: a model cannot read so many.
    """
    if wanted is None:
        return min(reader.seq_len for reader in readers.values())
    problems = [
        Problem("score.seq_len", wanted, f"{name} has {reader.max_positions} positions", "lower it, or leave it out")
        for name, reader in readers.items()
        if reader.max_positions is not None and reader.max_positions < wanted
    ]
    if problems:
        raise ConfigError(problems)
    return wanted


def digest(texts: Sequence[str], labels_N: Tensor) -> str:
    """Return 64 hex digits that are equal for equal texts with equal labels."""
    found = sha256()
    for text, label in zip(texts, labels_N.tolist(), strict=True):
        found.update(f"{label}:{len(text)}:{text}".encode())
    return found.hexdigest()
