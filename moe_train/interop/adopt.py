"""A configuration whose architecture is that of a folder: ``model=pretrained model.init_from=DIR``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from moe_train.errors import ConfigError
from moe_train.interop.folder import read_public_config
from moe_train.interop.native import family_in

KEPT = ("init_from", "adopt", "upcycle")
"""Keys of the model that no folder has."""


def adopted(mapping: dict[str, Any], explicit: frozenset[str]) -> dict[str, Any]:
    """Return a composed configuration with the folder's architecture.

    What the user set on the command line stays. A run that goes on takes the architecture from its own config.yaml:
    the folder may be gone.

    Args:
        mapping: composed, with model.init_from and model.adopt=true.
        explicit: keys and groups (with slashes) that the user set.

    Raises:
        ConfigError: the folder's model is not covered; lists every reason.
        DataError: the folder or its config.json cannot be read.
    """
    model = mapping["model"]
    architecture = own_architecture(mapping) or folder_architecture(str(model["init_from"]))
    for key in KEPT:
        if key in model:
            architecture[key] = model[key]
    for path in stated_below_model(explicit):
        overlay(architecture, model, path)
    return {**mapping, "model": architecture}


def own_architecture(mapping: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model section of the run's own config.yaml, when it began from the same folder."""
    path = Path(str(mapping["run"]["dir"])).expanduser() / "config.yaml"
    if not path.is_file():
        return None
    written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    model: dict[str, Any] = written.get("model", {})
    same = model.get("adopt") and model.get("init_from") == mapping["model"]["init_from"]
    return model if same else None


def folder_architecture(init_from: str) -> dict[str, Any]:
    """Return the model section that a folder's config.json describes."""
    path = Path(init_from).expanduser()
    public = read_public_config(path)
    found = family_in(public, path).architecture(public)
    if found.problems:
        raise ConfigError(found.problems)
    return dict(found.model)


def stated_below_model(explicit: frozenset[str]) -> Iterator[list[str]]:
    """Yield the paths below the model that the user set, by key or by choosing a group's option."""
    for key in explicit:
        parts = key.replace("/", ".").split(".")
        if parts[0] == "model" and len(parts) > 1:
            yield parts[1:]


def overlay(target: dict[str, Any], source: Mapping[str, Any], path: list[str]) -> None:
    """Copy what lies at ``path`` from source to target; sections on the way are made."""
    *above, last = path
    for part in above:
        if part not in source:
            return
        source = source[part]
        target = target.setdefault(part, {})
    if last in source:
        target[last] = source[last]
