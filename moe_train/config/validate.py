"""From a plain mapping to a validated configuration, with every problem found at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moe_train.config.groups import is_group, options_of
from moe_train.errors import ConfigError, Problem

Schema = TypeVar("Schema", bound=BaseModel)
Rules: TypeAlias = Callable[[Schema], list[Problem]]
Prepare: TypeAlias = Callable[[dict[str, Any], frozenset[str]], dict[str, Any]]
"""Completes a composed mapping before it is validated; gets the keys that the user set on the command line too."""
MISSING = "???"
"""OmegaConf's mark of a value that must be given."""


def as_composed(mapping: dict[str, Any], explicit: frozenset[str]) -> dict[str, Any]:
    """Return the mapping as it is."""
    return mapping


def validate(
    mapping: Mapping[str, Any], schema: type[Schema], rules: Rules[Schema], explicit: frozenset[str] = frozenset()
) -> Schema:
    """Return the validated configuration.

    Args:
        mapping: the composed configuration.
        schema: the pydantic model that it must fit.
        rules: what must hold across fields.
        explicit: dotted keys that the user set on the command line.

    Raises:
        ConfigError: with one problem per unknown key, wrong type, value out of bounds, and broken rule.
    """
    cleaned = without_leftovers(without_missing(mapping), schema, explicit)
    try:
        config = schema.model_validate(cleaned)
        problems = rules(config)
    except ValidationError as error:
        details = error.errors()
        problems = [problem for detail in details for problem in to_problems(detail, schema)]
        problems += problems_beyond(details, cleaned, schema, rules)
    if problems:
        raise ConfigError(problems)
    return config


def problems_beyond(
    details: list[ErrorDetails], mapping: dict[str, Any], schema: type[Schema], rules: Rules[Schema]
) -> list[Problem]:
    """Return the broken rules that do not involve the wrong fields: those get their defaults for the purpose."""
    wrong = [locate(detail["loc"], schema)[0] for detail in details]
    repaired = copy.deepcopy(mapping)
    for key in wrong:
        remove(repaired, key.split("."))
    try:
        broken = rules(schema.model_validate(repaired))
    except ValidationError:  # a required value is missing: nothing more can be said
        return []
    return [problem for problem in broken if not any(problem.key.startswith(key) for key in wrong)]


def remove(mapping: dict[str, Any], path: list[str]) -> None:
    """Delete the entry at ``path``; a position in a list deletes the whole list."""
    section: Any = mapping
    for part in path[:-1]:
        if not isinstance(section.get(part), dict):
            section.pop(part, None)
            return
        section = section[part]
    section.pop(path[-1], None)


def without_missing(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without values that were never given, so that the schema reports them as required."""
    return {
        key: without_missing(value) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if not (isinstance(value, str) and value == MISSING)
    }


def without_leftovers(
    mapping: dict[str, Any], schema: type[BaseModel], explicit: frozenset[str], prefix: str = ""
) -> dict[str, Any]:
    """Return a copy without fields that a preset set for another ``kind`` than the one now chosen.

    ``model=switch_tiny model.ffn.capacity.kind=dropless`` must work although the preset holds a factor. A field that
    the user wrote for the wrong kind stays, and the schema refuses it.
    """
    cleaned = dict(mapping)
    for name, field in schema.model_fields.items():
        value, path = cleaned.get(name), f"{prefix}{name}"
        kinds = entry_variants(field)
        if kinds and isinstance(value, dict):
            cleaned[name] = {k: of_its_kind(v, kinds, None, explicit, f"{path}.{k}") for k, v in value.items()}
        elif isinstance(value, dict):
            cleaned[name] = of_its_kind(value, variants_of(field), model_of(field), explicit, path)
    return cleaned


def of_its_kind(
    value: Any,
    variants: Mapping[str, type[BaseModel]],
    model: type[BaseModel] | None,
    explicit: frozenset[str],
    path: str,
) -> Any:
    """Return a section at ``path`` by the rule of `without_leftovers`; what is none stays as it is."""
    if not isinstance(value, dict):
        return value
    chosen = variants.get(str(value.get("kind"))) if variants else model
    if chosen is None:
        return value
    foreign = {key for variant in variants.values() for key in variant.model_fields} - set(chosen.model_fields)
    kept = {k: v for k, v in value.items() if k not in foreign or f"{path}.{k}" in explicit}
    return without_leftovers(kept, chosen, explicit, f"{path}.")


def entry_variants(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the models by ``kind`` of the entries of a mapping (``dict[str, Union]``); empty for any other field."""
    return variants_of(FieldInfo.from_annotation(get_args(field.annotation)[1])) if is_mapping(field) else {}


def is_mapping(field: FieldInfo) -> bool:
    """Whether a field is a mapping whose user gives the keys."""
    return get_origin(field.annotation) is dict


def variants_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the models of a union by their ``kind``; empty when the field is no such union. It may be null."""
    if field.discriminator is None:
        return {}
    models = [m for m in get_args(field.annotation) if m is not NoneType]
    return {get_args(m.model_fields["kind"].annotation)[0]: m for m in models}


def model_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section's model behind a field (``Section`` or ``Section | None``), or None for a value."""
    candidates = [field.annotation, *get_args(field.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def to_problems(detail: ErrorDetails, schema: type[BaseModel]) -> Iterator[Problem]:
    """Turn one of pydantic's errors into problems with a remedy: an unknown section gives one for each of its keys."""
    key, section = locate(detail["loc"], schema)
    value = detail["input"]
    if detail["type"] != "extra_forbidden":
        yield to_problem(detail, key)
    elif key.rpartition(".")[2] in other_kinds(section, schema):
        kind = section.model_fields["kind"].default
        yield Problem(key, value, f"does not apply to kind={kind}", "choose the kind that has it, or leave it out")
    else:
        for leaf, inner in leaves(key, value):
            siblings = [key_of(*field) for field in section.model_fields.items()] if leaf == key else []
            yield Problem(leaf, inner, "is not a key of the configuration", suggestion(leaf, siblings, schema))


def leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the dotted keys and values below ``key``, or itself."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def to_problem(detail: ErrorDetails, key: str) -> Problem:
    """Turn an error about the value of a known key into a problem with a remedy."""
    context = detail.get("ctx", {})
    value = detail["input"]
    if detail["type"] == "missing":
        return Problem(key, None, "is required", f"set {key}=...")
    if detail["type"] == "union_tag_not_found":
        return Problem(f"{key}.kind", None, "is required", f"set {key}.kind=...")
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        allowed = str(context.get("expected") or context.get("expected_tags"))
        if detail["type"] == "union_tag_invalid":
            key, value = f"{key}.kind", context.get("tag")
        return Problem(key, value, f"must be one of {allowed}", "choose one of them" + closest(str(value), allowed))
    if isinstance(value, Mapping):
        return Problem(key, None, detail["msg"].lower(), "give a single value")
    if detail["type"] == "model_type":
        group = key.replace(".", "/")
        choice = f" or choose {group}={'|'.join(options_of(group))}" if is_group(group) else ""
        return Problem(key, value, "is a section, not a value", f"set the keys in it{choice}")
    return Problem(key, value, detail["msg"].replace("Input should", "should"), "correct the value")


def locate(loc: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Return the dotted key of an error and the section in which it lies; pydantic's union tags are left out."""
    parts: list[str] = []
    section = schema
    rest = list(loc)
    while rest:
        part = str(rest.pop(0))
        parts.append(part)
        field = section.model_fields.get(part)
        if field is None:
            continue  # an unknown key, or the label of a dictionary's entry
        variants = variants_of(field) or entry_variants(field)
        if rest and entry_variants(field):
            parts.append(str(rest.pop(0)))  # the label of the entry
        section = variants[str(rest.pop(0))] if variants and rest else model_of(field) or section
    return ".".join(parts), section


def other_kinds(section: type[BaseModel], schema: type[BaseModel]) -> set[str]:
    """Return the fields that the other kinds of the union have to which ``section`` belongs; empty if to none."""
    for field in schema.model_fields.values():
        variants = list((variants_of(field) or entry_variants(field)).values())
        if section in variants:
            return {name for variant in variants for name in variant.model_fields}
        inner = model_of(field)
        found = other_kinds(section, inner) if inner and not variants else set()
        if found:
            return found
    return set()


def key_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema, unions with the keys of all their kinds."""
    for name, field in schema.model_fields.items():
        entries = entry_variants(field)
        variants = entries or variants_of(field)
        sections = list(variants.values()) if variants else [m for m in [model_of(field)] if m]
        path = f"{prefix}{key_of(name, field)}"
        yield path
        path += ".NAME" if entries else ""
        for section in sections:
            yield from key_paths(section, f"{path}.")


def key_of(name: str, field: FieldInfo) -> str:
    """Return the key of a field: its name, unless that is a word of Python's."""
    return field.alias or name


def suggestion(key: str, siblings: list[str], schema: type[BaseModel]) -> str:
    """Return a remedy for an unknown key: the key that was probably meant.

    Args:
        key: the unknown key.
        siblings: fields of the section in which it stands; none when that section does not exist.
        schema: of the whole configuration.
    """
    parent, _, leaf = key.rpartition(".")
    paths = list(dict.fromkeys(key_paths(schema)))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == leaf]
    beside = [f"{parent}.{name}".lstrip(".") for name in difflib.get_close_matches(leaf, siblings, n=1)]
    by_leaf = {path.rpartition(".")[2]: path for path in paths}
    similar = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)]
    found = most_alike(key, elsewhere + beside) or difflib.get_close_matches(key, paths, n=1) or similar
    return f"did you mean {found[0]}?" if found and found[0] != key else "see --cfg job for all keys"


def most_alike(key: str, paths: list[str]) -> list[str]:
    """Return the path that is most like ``key``, if there is any."""
    return sorted(paths, key=lambda path: -difflib.SequenceMatcher(None, key, path).ratio())[:1]


def closest(value: str, allowed: str) -> str:
    """Return ``: X?`` with the allowed value most like ``value``, or nothing."""
    names = [name.strip(" '") for name in allowed.replace(" or ", ", ").split(",")]
    found = difflib.get_close_matches(value, names, n=1)
    return f" (did you mean {found[0]}?)" if found else ""
