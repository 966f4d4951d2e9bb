"""How Hydra composes a configuration here: the schema's defaults, the YAML groups, the command line.

The defaults of the schema are registered as Hydra's node ``schema/NAME``, so that ``--cfg job`` and ``--help`` show
every key while the YAML files state only what differs.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moe_train.config.groups import config_dir, is_group, options_of
from moe_train.config.validate import MISSING, Rules, model_of, validate
from moe_train.errors import ConfigError, Problem

Schema = TypeVar("Schema", bound=BaseModel)


def register(name: str, schema: type[BaseModel]) -> None:
    """Make the schema's defaults Hydra's node ``schema/name``."""
    ConfigStore.instance().store(group="schema", name=name, node=defaults_of(schema))


def defaults_of(schema: type[BaseModel]) -> dict[str, Any]:
    """Return every default as a plain mapping; values that must be given are OmegaConf's missing mark."""
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        section = model_of(field)
        if field.default is PydanticUndefined:
            values[name] = defaults_of(section) if section else MISSING
        elif isinstance(field.default, BaseModel):
            values[name] = field.default.model_dump(mode="json")
        else:
            values[name] = field.default
    return values


def with_force(argument: str) -> str:
    """Return an override that Hydra accepts for any key: the schema, not Hydra, decides which keys exist.

    Hydra refuses keys that no YAML names, with a hint to add "+", which would hide typing errors.
    """
    key, equals, _ = argument.partition("=")
    key = key.lstrip("+")
    if not equals or argument.startswith(("-", "~", "hydra")) or is_group(key.partition("@")[0]):
        return argument
    return f"++{argument.lstrip('+')}"


def compose_config(name: str, schema: type[Schema], rules: Rules[Schema], overrides: list[str]) -> Schema:
    """Compose and validate a configuration outside a Hydra application.

    Raises:
        ConfigError: with the problems of composition (unknown options, syntax) and those of the schema together.
    """
    register(name, schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        good, problems = separate(name, [with_force(o) for o in overrides])
        try:
            config = validate(to_mapping(compose(name, overrides=good)), schema, rules, keys_of(good))
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(Problem("command line", None, first_line(error), "correct it"))
    if problems:
        raise ConfigError(problems)
    return config


def separate(name: str, overrides: list[str]) -> tuple[list[str], list[Problem]]:
    """Return the overrides that compose, each tried alone, and a problem for each of the others."""
    good: list[str] = []
    problems: list[Problem] = []
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        compose(name, overrides=overrides)
        return overrides, []
    for override in overrides:
        try:
            compose(name, overrides=[override])
            good.append(override)
        except (HydraException, OmegaConfBaseException) as error:
            key, _, value = override.lstrip("+").partition("=")
            problems.append(Problem(key, value or None, first_line(error), remedy_for(key, str(error))))
    return good, problems


def remedy_for(key: str, message: str) -> str:
    """Return what to do about an override that does not compose."""
    if message.startswith("Ambiguous value"):
        return "add -m for one run per value, or write a list as KEY=[A,B]"
    if is_group(key):
        return f"choose one of {', '.join(options_of(key))}"
    return "write it as KEY=VALUE (quote values with special characters)"


def first_line(error: Exception) -> str:
    """Return the first line of a message, without Hydra's ``In 'FILE': ``."""
    return re.sub(r"^In '[^']*': ", "", str(error).strip().splitlines()[0])


def keys_of(overrides: list[str]) -> frozenset[str]:
    """Return the dotted keys that overrides name."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return frozenset(o.key_or_group for o in parsed)


def to_mapping(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain containers, interpolations resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
