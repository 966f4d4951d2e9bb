"""The YAML files: folders are groups, the path of a folder is that of its key."""

from __future__ import annotations

from pathlib import Path

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


def options_of(group: str) -> list[str]:
    """Return the names of a group's options."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
