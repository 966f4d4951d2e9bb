"""Every YAML file composes, says something of its own, and repeats no default; every field is documented."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from moe_train.config import (
    agents,
    attention,
    balance,
    bench,
    classifier,
    depth,
    graph,
    inference,
    model,
    routing,
    schema,
    task,
)
from moe_train.config.agents import AgentsConfig
from moe_train.config.base import Strict
from moe_train.config.bench import BenchConfig
from moe_train.config.compose import compose_config
from moe_train.config.groups import config_dir, options_of
from moe_train.config.schema import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    ReportConfig,
    TrainConfig,
)
from moe_train.config.validate import variants_of

PRIMARY: dict[str, tuple[type[BaseModel], list[str]]] = {
    "train": (TrainConfig, []),
    "prepare": (PrepareConfig, []),
    "evaluate": (EvaluateConfig, ["run.dir=x"]),
    "generate": (GenerateConfig, ["run.dir=x", "prompt=hello"]),
    "report": (ReportConfig, ["run.dir=x"]),
    "export": (ExportConfig, ["run.dir=x", "to=y"]),
    "bench": (BenchConfig, []),
    "agents": (AgentsConfig, ["prompt=hello"]),
}
"""The files of the commands, with what must be given on the command line."""
FILES = sorted(path.relative_to(config_dir()) for path in config_dir().rglob("*.yaml"))
OPTIONS = [path for path in FILES if len(path.parts) > 1]
SELECTORS = {"kind", "source", "scope", "expert"}
"""A file may name the option that it is, even where that is the default."""
OWN_COMMAND = {"bench": "bench", "mixture": "agents"}
"""Groups of other commands than train."""
NEEDS = {"model/ffn/graph": ("model=graph_tiny",)}
"""What must be chosen before an option of a group can be: routed presets have no graph to choose."""
SIZES = {"num_experts", "top_k", "expert_dim", "hidden_dim", "experts", "top_groups"}
"""Sizes are what a preset is: another default must not make it another model. (A variant of the study changes what the
experiment has set, possibly back to a default.)"""


@functools.cache
def compose(name: str, *overrides: str) -> BaseModel:
    model, required = PRIMARY[name]
    return compose_config(name, model, lambda config: [], [*required, *overrides])


def composed_with(path: Path) -> BaseModel:
    """The configuration of a training, or of its own command, with the option that a file is."""
    group = path.parent.as_posix()
    return compose(OWN_COMMAND.get(group, "train"), *NEEDS.get(group, ()), f"{group}={path.stem}")


def leaves(mapping: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def stated(path: Path) -> list[tuple[tuple[str, ...], Any]]:
    """The values of a file by their full key, read as Hydra reads it; what it tells Hydra itself is left out."""
    content: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / path))
    for other in ("defaults", "hydra"):
        content.pop(other, None)
    is_global = (config_dir() / path).read_text().startswith("# @package _global_") or len(path.parts) == 1
    return list(leaves(content, () if is_global else path.parent.parts))


def test_every_command_is_known_here() -> None:
    assert {path.stem for path in FILES if len(path.parts) == 1} == PRIMARY.keys()


@pytest.mark.parametrize("name", PRIMARY)
def test_every_command_composes(name: str) -> None:
    assert compose(name)


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_option_composes_and_takes_effect(path: Path) -> None:
    config = composed_with(path).model_dump(mode="json")
    for key, value in stated(path):
        found: Any = config
        for part in key:
            found = found[part]
        if value == {}:
            assert isinstance(found, dict), f"{'.'.join(key)} is switched on"
        elif not isinstance(value, str) or "${" not in value:
            assert found == value, ".".join(key)


def test_every_kind_has_an_option_and_every_balance_method_too() -> None:
    for section, field, group in (
        (model.FFNConfig, "router", "model/ffn/router"),
        (model.FFNConfig, "capacity", "model/ffn/capacity"),
        (model.ModelConfig, "attention", "model/attention"),
    ):
        kinds = variants_of(section.model_fields[field])
        assert kinds.keys() <= set(options_of(group))
    assert balance.BalanceConfig.model_fields.keys() <= {*options_of("model/ffn/balance")}


@pytest.mark.parametrize("name", options_of("model/ffn/balance"))
def test_a_balance_option_switches_on_one_method_or_none(name: str) -> None:
    config = compose("train", f"model/ffn/balance=[{name}]").model_dump()["model"]["ffn"]["balance"]
    assert sum(section is not None for section in config.values()) == (name != "none")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_begins_with_what_it_is(path: Path) -> None:
    lines = (config_dir() / path).read_text().splitlines()
    comments = [line for line in lines[:2] if line.startswith("# ") and not line.startswith("# @package")]
    assert comments, "the first line says what the file is"


def default_of(section: BaseModel, key: tuple[str, ...]) -> Any:
    """The default of a key in the sections that were chosen, or a value that equals none."""
    for part in key[:-1]:
        section = getattr(section, part, None)
    return type(section).model_fields[key[-1]].default if isinstance(section, BaseModel) else object()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_repeats_a_default(path: Path) -> None:
    config = compose(path.stem) if len(path.parts) == 1 else composed_with(path)
    by_folder = {Path("model"): SIZES, Path("study"): SIZES | {"router_lr_ratio", "prenorm"}}
    allowed = SELECTORS | by_folder.get(path.parent, set())
    repeated = [key for key, value in stated(path) if default_of(config, key) == value]
    assert [".".join(key) for key in repeated if key[-1] not in allowed] == []


SECTIONS = [
    value
    for module in (schema, task, model, classifier, agents, attention, balance, depth, graph, inference, routing, bench)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Strict) and value.__module__ == module.__name__
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_documented(section: type[BaseModel]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_kind_of_a_union_names_itself(section: type[BaseModel]) -> None:
    for field in section.model_fields.values():
        for kind, variant in variants_of(field).items():
            assert variant.model_fields["kind"].default == kind
