"""The YAML files: folders are groups, the path of a folder is that of its key."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

LISTS = frozenset({"model/ffn/balance"})
"""Groups of which any number of options may be chosen: ``GROUP=[A,B]``."""


def config_dir() -> Path:
    """Return the folder of the YAML groups: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def is_group(key: str) -> bool:
    """Whether ``key`` names a folder of options (``model``, ``model/ffn/capacity``) rather than a value."""
    return key != "" and (config_dir() / key).is_dir()


def sections_of(group: str, options: Iterable[Any]) -> set[str]:
    """Return the keys that options of a group set."""
    files = [config_dir() / group / f"{option}.yaml" for option in options]
    return {key for file in files if file.is_file() for key in yaml.safe_load(file.read_text()) or {}}


def options_of(group: str) -> list[str]:
    """Return the names of a group's options."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
