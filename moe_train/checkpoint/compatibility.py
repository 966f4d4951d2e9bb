"""Refuses to go on with a run as another run than it was."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from moe_train.errors import CheckpointError, Problem

ABSENT = "(absent)"


def check_compatible(saved: Mapping[str, Any], now: Mapping[str, Any], allow: Collection[str]) -> None:
    """Compare what makes a run the run it is: seed, data, tokenizer, model, sequence length, batch, precision.

    What may change freely (steps, learning rate, logging, layout over ranks) is simply not in these mappings.

    Args:
        saved: the identity that the checkpoint holds; sections may be nested.
        now: the same of the present configuration.
        allow: dotted names that may differ, with all below them: ``model`` covers ``model.ffn.top_k``.

    Raises:
        CheckpointError: lists each difference, old -> new.
    """
    old, new = _leaves(_as_json(saved)), _leaves(_as_json(now))
    problems = [
        Problem(
            key,
            None,
            f"differs from the checkpoint: {old.get(key, ABSENT)} -> {new.get(key, ABSENT)}",
            "set it back, use another run.name, or checkpoint.resume=never",
        )
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ABSENT) != new.get(key, ABSENT) and not _covered(key, allow)
    ]
    if problems:
        raise CheckpointError(problems)


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping as it comes back from a file: a tuple must equal the list that it was saved as."""
    return dict(json.loads(json.dumps(identity)))


def _leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _covered(key: str, allow: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allow)
