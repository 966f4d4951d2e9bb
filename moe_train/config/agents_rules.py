"""Rules across the fields of a mixture of agents, and what must be there before the first call."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from moe_train.config.agents import AgentsConfig, HuggingFaceAgent, MixtureConfig, OpenAIAgent, RunAgent
from moe_train.config.validate import closest
from moe_train.errors import Problem

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
KEY = re.compile(r"[!-~]+")
"""What may stand in a header: visible ASCII."""
NAME = re.compile(r"\w[\w.-]*")


def agents_problems(config: AgentsConfig) -> list[Problem]:
    """Return every broken rule of a mixture."""
    mixture = config.mixture
    found = [
        *place_problems(config),
        *mode_problems(config),
        *name_problems(mixture),
        *agent_problems(mixture),
    ]
    return list(dict.fromkeys(found))  # agents that share an address share its problem


def place_problems(config: AgentsConfig) -> Iterator[Problem]:
    """Refuse several ranks, and a folder that cannot be made."""
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        yield Problem("WORLD_SIZE", ranks, "agents are called from one process", "start it without torchrun")
    folder = Path(config.output).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem("output", config.output, f"{existing} is a file, not a folder", "choose another folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("output", config.output, f"{existing} may not be written", "choose another folder")


def mode_problems(config: AgentsConfig) -> Iterator[Problem]:
    """Yield what the mode lacks."""
    if config.mode == "answer":
        yield from prompt_problems(config)
        return
    for name, agent in config.mixture.agents.items():
        if not isinstance(agent, RunAgent):
            rule = f"mode={config.mode} reads probabilities, which only agents of kind run give"
            yield Problem(f"mixture.agents.{name}.kind", agent.kind, rule, "leave the agent out")
    named = config.score.heldout_of
    if named is not None and named not in config.mixture.agents:
        yield unknown("score.heldout_of", named, config.mixture)


def prompt_problems(config: AgentsConfig) -> Iterator[Problem]:
    """Yield what is wrong with the request."""
    if config.prompt is not None and config.prompt_file is not None:
        yield Problem("prompt_file", config.prompt_file, "there is a prompt, too", "leave one of them out")
    elif config.prompt_file is not None:
        if not Path(config.prompt_file).expanduser().is_file():
            yield Problem("prompt_file", config.prompt_file, "is not a file", "give the path of a text file")
    elif config.prompt is None or not config.prompt.strip():
        yield Problem("prompt", config.prompt, "is required to answer", 'set prompt="..." or prompt_file=PATH')


def name_problems(mixture: MixtureConfig) -> Iterator[Problem]:
    """Yield names that are no agent's."""
    if not mixture.agents:
        yield Problem("mixture.agents", None, "there are none", "choose a preset (mixture=duo) or name agents")
    for name in mixture.agents:
        if not NAME.fullmatch(name):
            rule = "must consist of letters, digits and . _ -"
            yield Problem(f"mixture.agents.{name}", None, rule, "choose another name")
    for number, layer in enumerate(mixture.layers):
        for name in dict.fromkeys(layer):
            if name not in mixture.agents:
                yield unknown(f"mixture.layers[{number}]", name, mixture)
    if mixture.aggregator not in mixture.agents:
        yield unknown("mixture.aggregator", mixture.aggregator, mixture)
    if not mixture.synthesis.strip():
        rule = "without it an agent does not know what the answers are for"
        yield Problem("mixture.synthesis", None, rule, "leave it out to get the default")


def unknown(key: str, name: str, mixture: MixtureConfig) -> Problem:
    """Return the problem of a name that no agent has."""
    known = ", ".join(mixture.agents)
    return Problem(key, name, f"is not one of mixture.agents: {known}", "choose one of them" + closest(name, known))


def agent_problems(mixture: MixtureConfig) -> Iterator[Problem]:
    """Yield what each agent lacks."""
    for name, agent in mixture.agents.items():
        key = f"mixture.agents.{name}"
        match agent:
            case RunAgent():
                if not (Path(agent.dir).expanduser() / "config.yaml").is_file():
                    yield Problem(
                        f"{key}.dir", agent.dir, "holds no config.yaml", "name the folder of a run: runs/NAME"
                    )
            case HuggingFaceAgent():
                yield from folder_problems(key, agent)
            case OpenAIAgent():
                yield from address_problems(key, agent, mixture)
                yield from key_problems(key, agent, mixture)


def folder_problems(key: str, agent: HuggingFaceAgent) -> Iterator[Problem]:
    """Yield why a public folder cannot be run."""
    if not (Path(agent.path).expanduser() / "config.json").is_file():
        yield Problem(f"{key}.path", agent.path, "holds no config.json", "name a folder on this machine")
    if importlib.util.find_spec("transformers") is None:
        rule = "needs transformers, which is not installed"
        yield Problem(f"{key}.kind", agent.kind, rule, "pip install 'moe_train[hf]'")


def address_problems(key: str, agent: OpenAIAgent, mixture: MixtureConfig) -> Iterator[Problem]:
    """Yield what is wrong with the address. It is not shown where it may hold a password."""
    place, address = address_of(key, agent, mixture)
    if address is None:
        yield Problem(place, None, "is required", f"set it, or {key}.base_url: http://127.0.0.1:8000/v1 or the like")
        return
    try:
        parts = urlsplit(address)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets that do not close, a port that is no number
        is_good = False
    if "@" in address:
        yield Problem(place, None, "must not hold user and password", "leave them out; a key belongs into key_env")
    elif not is_good or not KEY.fullmatch(address) or parts.query or parts.fragment:
        rule = "is not the address of an endpoint"
        yield Problem(place, address, rule, "write http://HOST:PORT/v1 or https://HOST/v1")


def key_problems(key: str, agent: OpenAIAgent, mixture: MixtureConfig) -> Iterator[Problem]:
    """Yield what is wrong with the variable that holds the key; what it holds is never shown."""
    place, name = key_variable_of(key, agent, mixture)
    if name is None:
        return
    if not VARIABLE.fullmatch(name):  # it may be the key itself
        rule = "is the name of an environment variable, in capitals, never a key"
        yield Problem(place, None, rule, "export OPENAI_API_KEY=..., and set it to OPENAI_API_KEY")
    elif not (secret := os.environ.get(name, "").strip()):
        yield Problem(place, name, "there is no such environment variable", f"export {name}=...")
    elif not KEY.fullmatch(secret):
        yield Problem(place, name, "holds characters that no key has", f"export {name}=... again")


def address_of(key: str, agent: OpenAIAgent, mixture: MixtureConfig) -> tuple[str, str | None]:
    """Return where the address of an agent stands, and the address."""
    if agent.base_url is not None:
        return f"{key}.base_url", agent.base_url
    return "mixture.base_url", mixture.base_url


def key_variable_of(key: str, agent: OpenAIAgent, mixture: MixtureConfig) -> tuple[str, str | None]:
    """Return where the name of the variable with an agent's key stands, and the name."""
    if agent.key_env is not None:
        return f"{key}.key_env", agent.key_env
    return "mixture.key_env", mixture.key_env
