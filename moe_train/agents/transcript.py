"""What was asked, said, tried and left out: a record that is written as JSON while the mixture goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_train.agents.agent import Answer, Attempt, Message
from moe_train.config.agents import AgentsConfig
from moe_train.observe.files import write_atomically
from moe_train.observe.redact import redact_all

VERSION = 1
"""Of the format of the file; raised with every change that a reader would notice."""
FILE_NAME = "transcript.json"


@dataclass
class Call:
    """One question to one agent.

    Attributes:
        agent: its name.
        sent: what it was sent.
        attempts: what became of each attempt, in order.
        answer: what it said; None: nothing, or not yet.
        failure: why it was left out; None: it was not.
        seconds: from the first attempt to the last, waits included, but not the wait for its turn; None: not ended.
    """

    agent: str
    sent: tuple[Message, ...]
    attempts: list[Attempt] = field(default_factory=list)
    answer: Answer | None = None
    failure: str | None = None
    seconds: float | None = None


@dataclass
class Transcript:
    """A conversation of a mixture.

    Attributes:
        name: of the conversation.
        started_utc: when it began, ISO 8601.
        request: of the user.
        agents: what the configuration says of each agent, by name; keys are not part of it.
        layers: the calls of each layer; the last layer is the aggregator's.
        events: what the user was told meanwhile.
        status: ``running``, ``done`` or ``failed``.
        error: why it failed.
        answer: of the mixture.
    """

    name: str
    started_utc: str
    request: str
    agents: dict[str, dict[str, Any]]
    layers: list[list[Call]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    status: Literal["running", "done", "failed"] = "running"
    error: str | None = None
    answer: str | None = None

    @classmethod
    def begin(cls, config: AgentsConfig, request: str, started_utc: str) -> Transcript:
        """Return the transcript of a conversation that begins."""
        agents = {name: agent.model_dump(mode="json") for name, agent in config.mixture.agents.items()}
        return cls(config.name, started_utc, request, redact_all(agents))

    @property
    def calls(self) -> list[Call]:
        """All calls, layer by layer."""
        return [call for layer in self.layers for call in layer]

    def as_mapping(self) -> Mapping[str, Any]:
        """Return what the file holds."""
        count = {"calls": len(self.calls), "attempts": sum(len(call.attempts) for call in self.calls)}
        return {"version": VERSION, **count, **asdict(self)}

    def write(self, folder: Path) -> Path:
        """Write ``transcript.json``, whole or not at all, and return its path.

        Raises:
            OSError: the folder cannot be written.
        """
        path = folder / FILE_NAME
        write_atomically(path, json.dumps(self.as_mapping(), indent=1, ensure_ascii=False) + "\n")
        return path
