"""How Hydra composes a configuration here: the schema's defaults, the YAML groups, the command line.

The defaults of the schema are registered as Hydra's node ``schema/NAME``, while the YAML files state only what differs.
A section that is chosen by ``kind`` or switched on enters without its defaults: what one kind leaves unsaid must not
become the value of another. ``--cfg job`` and ``--help`` get them from `unstated`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moe_train.config.groups import LISTS, config_dir, is_group, options_of, sections_of
from moe_train.config.validate import (
    MISSING,
    Prepare,
    Rules,
    as_composed,
    closest,
    model_of,
    validate,
    variants_of,
)
from moe_train.errors import ConfigError, Problem

Schema = TypeVar("Schema", bound=BaseModel)
SENTENCES = frozenset({"text", "prompt"})
"""Keys whose value is what a person writes."""
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # Hydra refuses GROUP=null with a ValueError


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
            values[name] = stated(field.default, field)
        else:
            values[name] = field.default
    return values


def stated_by(section: BaseModel) -> dict[str, Any]:
    """Return a section as a plain mapping; one that is chosen by ``kind`` without the defaults of its kind."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values[name] = stated(value, field)
    return values


def stated(section: BaseModel, field: FieldInfo) -> dict[str, Any]:
    """Return the section of a field as a plain mapping, by `stated_by`'s rule."""
    if variants_of(field):
        return section.model_dump(mode="json", exclude_defaults=True) | section.model_dump(include={"kind"})
    return stated_by(section)


def with_force(argument: str) -> str:
    """Return an override that Hydra accepts for any key: the schema, not Hydra, decides which keys exist.

    Hydra refuses keys that no YAML names, with a hint to add "+", which would hide typing errors.
    """
    key, equals, value = argument.partition("=")
    key = key.lstrip("+")
    if not equals or argument.startswith(("-", "~", "hydra")) or is_group(key.partition("@")[0]):
        return argument
    return f"++{key}={quoted(value) if key in SENTENCES else value}"


def quoted(sentence: str) -> str:
    """Return what a user typed as one value in Hydra's grammar: commas, apostrophes and brackets belong to the text.

    What is quoted already stays so, and so does null, the absence of a text.
    """
    if sentence == "null" or (len(sentence) > 1 and sentence[0] in "'\"" and sentence[-1] == sentence[0]):
        return sentence
    # A quote is escaped, and so are the backslashes before it, which would otherwise escape it; ${ begins no reference.
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), sentence)
    return '"' + re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", escaped) + '"'


def compose_config(
    name: str, schema: type[Schema], rules: Rules[Schema], overrides: list[str], prepare: Prepare = as_composed
) -> Schema:
    """Compose and validate a configuration outside a Hydra application.

    Args:
        name: the primary YAML file.
        schema: the model that the configuration must fit.
        rules: what must hold across fields.
        overrides: KEY=VALUE and GROUP=OPTION.
        prepare: completes the composed mapping.

    Raises:
        ConfigError: with the problems of composition (unknown options, syntax) and those of the schema together.
    """
    register(name, schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        good, problems = separate(name, [with_force(o) for o in overrides])
        try:
            mapping = to_mapping(compose(name, overrides=good))
            config = validated(mapping, schema, rules, prepare, good)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        except COMPOSITION_ERRORS as error:
            problems.append(joint_problem(error))
    if problems:
        raise ConfigError(problems)
    return config


def validated(
    mapping: dict[str, Any], schema: type[Schema], rules: Rules[Schema], prepare: Prepare, overrides: list[str]
) -> Schema:
    """Return the validated configuration of a composed mapping; overrides: those that it was composed with.

    Raises:
        ConfigError: with every problem.
    """
    explicit = keys_of(overrides)
    return validate(prepare(chosen_only(mapping, overrides), explicit), schema, rules, explicit)


def chosen_only(mapping: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return the mapping without the sections of a list group that its user did not choose.

    A preset chooses balance losses and then says how strong they are: of those that ``model/ffn/balance=[...]`` leaves
    out, the strength must not stay behind and switch them on again.
    """
    cleaned, explicit = mapping, keys_of(overrides)
    for override in OverridesParser.create().parse_overrides(overrides):
        group = override.key_or_group
        if group not in LISTS:
            continue
        value = override.value()
        chosen = sections_of(group, value if isinstance(value, list) else [value])
        for section in sections_of(group, options_of(group)) - chosen:
            path = [*group.split("/"), section]
            if not any(f"{key}.".startswith(".".join(path) + ".") for key in explicit):
                cleaned = without(cleaned, path)
    return cleaned


def without(mapping: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return a copy of nested sections without what lies at ``path``."""
    first, *rest = path
    if first not in mapping:
        return mapping
    if not rest:
        return {key: value for key, value in mapping.items() if key != first}
    return {**mapping, first: without(mapping[first], rest)}


def unstated(name: str, schema: type[BaseModel], overrides: list[str]) -> list[str]:
    """Return the overrides after which Hydra's composition has exactly the keys of the validated configuration.

    They add the defaults of chosen sections and delete what a preset set for another kind. None when the configuration
    is not valid: then there is only Hydra's composition to show.
    """
    try:
        config = compose_config(name, schema, lambda config: [], overrides)
    except ConfigError:
        return []
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = to_mapping(compose(name, overrides=[with_force(o) for o in overrides]))
    wanted, present = dict(values_of(config.model_dump(mode="json"))), dict(values_of(composed))
    added = [f"++{key}={as_override(value)}" for key, value in wanted.items() if key not in present]
    # What lies below a section that is now null is gone with it.
    gone = [key for key in present if key not in wanted and not any(key.startswith(f"{w}.") for w in wanted)]
    return added + [f"~{key}" for key in gone]


def as_override(value: object) -> str:
    """Return a value in Hydra's grammar: JSON, but for the keys of a mapping, which have no quotes."""
    if isinstance(value, list):
        return f"[{','.join(as_override(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def values_of(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of whatever is no section."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from values_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def separate(name: str, overrides: list[str]) -> tuple[list[str], list[Problem]]:
    """Return the overrides that compose, each tried alone, and a problem for each of the others."""
    lists = [(override, problem) for override in overrides if (problem := list_problem(override))]
    problems = [problem for _, problem in lists]
    tried = [override for override in overrides if override not in dict(lists)]
    with contextlib.suppress(*COMPOSITION_ERRORS):
        compose(name, overrides=tried)
        return tried, problems
    good: list[str] = []
    for override in tried:
        try:
            compose(name, overrides=[override])
            good.append(override)
        except COMPOSITION_ERRORS as error:
            problems.append(lone_problem(override, error))
    return good, problems


def lone_problem(override: str, error: Exception) -> Problem:
    """Return the problem of an override that does not compose by itself."""
    key, _, value = override.lstrip("+").partition("=")
    if value in options_of(key):
        return joint_problem(error)  # a good choice, but not with this preset
    return Problem(key, value or None, first_line(error), remedy_for(key, first_line(error)))


def list_problem(override: str) -> Problem | None:
    """Return a problem when a group of which one option is chosen gets a list: Hydra would take the last in silence."""
    key, _, value = override.lstrip("+").partition("=")
    group = key.partition("@")[0]
    if not is_group(group) or group in LISTS or not value.startswith("["):
        return None
    return Problem(key, value, "takes one option, not a list", choice_of(group))


def joint_problem(error: Exception) -> Problem:
    """Return the problem of overrides that compose alone, but not together."""
    missing = re.match(r"Could not override '([^']*)'\. No match in the defaults list", first_line(error))
    if missing:
        group = missing[1]
        return Problem(group, None, "the chosen preset has no such choice", f"choose another, or write +{group}=...")
    return Problem("command line", None, first_line(error), "correct it")


def remedy_for(key: str, message: str) -> str:
    """Return what to do about an override that does not compose."""
    group = key.partition("@")[0]
    if message.startswith("Ambiguous value"):
        as_list = ", or write a list as KEY=[A,B]" if group in LISTS or not is_group(group) else ""
        return f"add -m for one run per value{as_list}"
    if is_group(group):
        named = re.search(r"'([^']*)'", message)
        return choice_of(group) + closest(named[1].rpartition("/")[2] if named else "", ", ".join(options_of(group)))
    return "write it as KEY=VALUE (quote values with special characters)"


def choice_of(group: str) -> str:
    """Return how an option of a group is chosen."""
    names = ", ".join(options_of(group))
    return f"choose any of {names} as {group}=[A,B]" if group in LISTS else f"choose one of {names}"


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
